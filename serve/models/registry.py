"""The generators of one worker, by name. They are loaded one after the other while the server already answers requests."""

import asyncio
import gc
import logging
from concurrent.futures import ThreadPoolExecutor

from uni_instruct.serve.batching.device_thread import DeviceThreads
from uni_instruct.serve.errors import UnknownModelError
from uni_instruct.serve.metrics import ServerMetrics
from uni_instruct.serve.model_sources import sources_by_name
from uni_instruct.serve.models.reload import Fingerprint, fingerprint
from uni_instruct.serve.models.served_model import Lease, ServedModel, State
from uni_instruct.serve.process.shutdown import GracefulShutdown
from uni_instruct.serve.settings import Settings

logger = logging.getLogger(__name__)

# Only a few threads: they compete with the engine for the CPU's cores, and the engine is the bottleneck.
_ENCODER_THREADS = 2


class Models:
    """All generators that this worker serves. A request names one; without a name it gets the first.

    A generator that cannot be loaded is reported (`states`, /readyz, /v1/models) and does not affect the others.
    Raises RequestError if two of the settings' bundles have the same name.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.metrics = ServerMetrics()
        self.encoders = ThreadPoolExecutor(_ENCODER_THREADS, thread_name_prefix="encode")
        self.stopping = GracefulShutdown(settings.grace_s)
        self._loading_finished = False
        self._devices = DeviceThreads()
        self._last_fingerprints: dict[str, Fingerprint | None] = {}  # name -> files of the latest attempt to load it
        self._retired: set[ServedModel] = set()  # replaced by newer ones, but with requests that are still running
        self._served = {name: self._new(name, source) for name, source in sources_by_name(settings.bundle).items()}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all models, loaded or not; the default comes first."""
        return tuple(self._served)

    @property
    def default_name(self) -> str:
        """The model of requests that name none."""
        return self.names[0]

    @property
    def states(self) -> dict[str, State]:
        """Name -> 'loading', 'ready', 'failed', or 'closed' once the server has stopped."""
        return {name: served.state for name, served in self._served.items()}

    @property
    def ready(self) -> bool:
        """Whether loading is finished and at least one model is ready. False again once the server is stopping."""
        return self._loading_finished and "ready" in self.states.values()

    @property
    def alive(self) -> bool:
        """False if only a restart helps: no model could be loaded, or the queue of a loaded one is no longer processed."""
        loaded = [served for served in self._served.values() if served.failure is None]
        return bool(loaded) and all(served.alive for served in loaded)

    def get(self, name: str | None = None) -> ServedModel:
        """Return the current model of that name (None: the default), to read its properties. Raises UnknownModelError.

        To make images use `using`: a reload may close the model that this returns.
        """
        chosen = self.default_name if name is None else name
        if chosen not in self._served:
            raise UnknownModelError(chosen, self.names)
        return self._served[chosen]

    def using(self, name: str | None = None) -> Lease:
        """Return a context manager that yields the same model and keeps it open, even if a reload replaces it meanwhile."""
        return self.get(name).lease

    async def load(self) -> None:
        """Load all models, the default first. One at a time, so that they do not disturb each other's timing of batch sizes."""
        for name, served in self._served.items():
            await served.load()
            self._last_fingerprints[name] = served.fingerprint
            self._report(name)

    def mark_ready(self) -> None:
        """Mark the server as ready. Call it after everything that stays until the end (models, demo) has been loaded."""
        tune_garbage_collector()
        self._loading_finished = True
        self.metrics.ready.set(self.ready)

    async def watch(self) -> None:
        """Look every `reload_s` seconds for bundles that changed on disk, and reload them. Runs until cancelled; 0: returns.

        The new model is loaded and warmed up while the old one still answers. Then it takes over, and the old one is closed
        after its running requests.
        """
        seen: dict[str, Fingerprint | None] = {}
        while self.settings.reload_s:
            await asyncio.sleep(self.settings.reload_s)
            for name, served in list(self._served.items()):
                now = await asyncio.to_thread(fingerprint, served.source)
                # Reload only after two equal looks: files that are still being copied would seem damaged.
                settled, seen[name] = now == seen.get(name), now
                if settled and now is not None and now != self._last_fingerprints[name]:
                    try:
                        await self._replace(name)
                    except Exception:  # closing a runtime may raise anything, and the other models must still be watched
                        logger.exception("replacing the generator %s by its new version failed", name)

    async def _replace(self, name: str) -> None:
        older = self._served[name]
        newer = self._new(name, older.source)
        await newer.load()
        self._last_fingerprints[name] = newer.fingerprint
        # If the older one failed as well, the newer one takes over, so that the current error is reported.
        if newer.failure is not None and older.failure is None:
            logger.error(
                "the generator %s has changed on disk, and the new version cannot be loaded; the old one is still served", name
            )
            self.metrics.reloads.labels(name, "failed").inc()
            return
        self._retired.add(older)
        self._served[name] = newer  # from now on requests get the newer model
        self.metrics.reloads.labels(name, "failed" if newer.failure else "loaded").inc()
        if older.state == "ready":
            self.metrics.engine.labels(str(older.engine.id), name).set(0)
        self._report(name)
        await older.drain()
        self._retired.discard(older)
        tune_garbage_collector()
        self.metrics.ready.set(self.ready)

    def fail_waiting(self) -> None:
        """End the requests that wait for an engine with 503, and stop being ready. Called when the server begins to stop."""
        self.metrics.ready.set(0)
        self._loading_finished = False
        for served in (*self._served.values(), *self._retired):
            served.fail_waiting()

    async def close(self) -> None:
        """Stop every engine after its running batch, and end the worker's threads."""
        self.metrics.ready.set(0)
        self._loading_finished = False
        for served in (*self._served.values(), *self._retired):
            await served.close()
        self._devices.close()
        self.encoders.shutdown()

    def _new(self, name: str, source: str) -> ServedModel:
        metrics = self.metrics.of_model(name)
        return ServedModel(name, source, self.settings, metrics=metrics, devices=self._devices, encoders=self.encoders)

    def _report(self, name: str) -> None:
        served = self._served[name]
        self.metrics.model_ready.labels(name).set(served.state == "ready")
        if served.state == "ready":
            self.metrics.engine.labels(str(served.engine.id), name).set(1)


def tune_garbage_collector() -> None:
    """Exempt all objects that exist now from garbage collection, and let later ones be collected in small steps.

    What is loaded by now stays until the end, so scanning it finds no garbage. Those scans caused the slowest answers.
    """
    gc.unfreeze()  # so that a model that a reload has replaced can be collected
    gc.collect()
    gc.freeze()
    # Collect again, with nothing left to scan: CPython delays its next full collection until the new objects exceed a quarter
    # of those that survived the last one, and this sets that number to about zero.
    gc.collect()
    # Freeing 5,000 objects stops the event loop for 1 ms, 50,000 for 60 ms. Collections are rare: requests leave no cycles of
    # our objects.
    gc.set_threshold(5_000, 10, 10)
