"""The generators of one worker, by name: loaded one after the other while the server already answers."""

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

# Few: encoders compete with the engine for the cores, and the engine is what requests wait for.
_ENCODER_THREADS = 2


class Models:
    """Every generator that this worker serves. Requests name one; without a name they get the first.

    One that cannot be loaded is reported (`states`, /readyz, /v1/models) and leaves the others alone.
    Raises RequestError where two of the settings' bundles have one name.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.metrics = ServerMetrics()
        self.encoders = ThreadPoolExecutor(_ENCODER_THREADS, thread_name_prefix="encode")
        self.stopping = GracefulShutdown(settings.grace_s)
        self._settled = False
        self._devices = DeviceThreads()
        self._tried: dict[str, Fingerprint | None] = {}  # the newest files of each model that loading was tried with
        self._retired: set[ServedModel] = set()  # exchanged for newer ones, but still with requests to answer
        self._served = {name: self._new(name, source) for name, source in sources_by_name(settings.bundle).items()}

    @property
    def names(self) -> tuple[str, ...]:
        """What requests may name, loaded or not; the default comes first."""
        return tuple(self._served)

    @property
    def default_name(self) -> str:
        """The model of requests that name none."""
        return self.names[0]

    @property
    def states(self) -> dict[str, State]:
        """Name -> 'loading', 'ready' or 'failed'."""
        return {name: served.state for name, served in self._served.items()}

    @property
    def ready(self) -> bool:
        """Whether loading is over and at least one model can be asked."""
        return self._settled and "ready" in self.states.values()

    @property
    def alive(self) -> bool:
        """False where only a restart helps: no model could be loaded, or a loaded one's queue is no longer served."""
        loaded = [served for served in self._served.values() if served.failure is None]
        return bool(loaded) and all(served.alive for served in loaded)

    def get(self, name: str | None = None) -> ServedModel:
        """The model of that name as it stands now, for its facts; None: the default. Raises UnknownModelError."""
        chosen = self.default_name if name is None else name
        if chosen not in self._served:
            raise UnknownModelError(chosen, self.names)
        return self._served[chosen]

    def using(self, name: str | None = None) -> Lease:
        """The same, for making images: within `with` it is not closed, even if a newer one takes its place."""
        return self.get(name).lease

    async def load(self) -> None:
        """Loads all, the default first; one at a time, as each measures which batch sizes are fast enough."""
        for name, served in self._served.items():
            await served.load()
            self._tried[name] = served.fingerprint
            self._report(name)

    def mark_ready(self) -> None:
        """To be called once everything that lives as long as the server has been loaded."""
        tune_garbage_collector()
        self._settled = True
        self.metrics.ready.set(self.ready)

    async def watch(self) -> None:
        """Looks for bundles that have changed, for ever: each takes the place of the one that is served. 0: never looks.

        The newer one is loaded and warmed beside the older, which answers until then, finishes what it has, and is closed.
        """
        seen: dict[str, Fingerprint | None] = {}
        while self.settings.reload_s:
            await asyncio.sleep(self.settings.reload_s)
            for name, served in list(self._served.items()):
                now = await asyncio.to_thread(fingerprint, served.source)
                # Twice the same: files that are still being copied would be taken for damaged.
                settled, seen[name] = now == seen.get(name), now
                if settled and now is not None and now != self._tried[name]:
                    try:
                        await self._exchange(name)
                    except Exception:  # whatever a runtime raises when it is closed: the others must still be watched
                        logger.exception("the exchange of %s failed", name)

    async def _exchange(self, name: str) -> None:
        older = self._served[name]
        newer = self._new(name, older.source)
        await newer.load()
        self._tried[name] = newer.fingerprint
        if newer.failure is not None and older.failure is None:
            logger.error("the generator %s has changed and cannot be loaded; the older one is served on", name)
            self.metrics.reloads.labels(name, "failed").inc()
            return
        self._retired.add(older)
        self._served[name] = newer  # from here on requests get the newer one
        self.metrics.reloads.labels(name, "failed" if newer.failure else "loaded").inc()
        if older.state == "ready":
            self.metrics.engine.labels(str(older.engine.id), name).set(0)
        self._report(name)
        await older.drain()
        self._retired.discard(older)
        tune_garbage_collector()
        self.metrics.ready.set(self.ready)

    def fail_waiting(self) -> None:
        """Answers what waits for an engine with 503, and stops being ready: the server is about to stop."""
        self.metrics.ready.set(0)
        self._settled = False
        for served in (*self._served.values(), *self._retired):
            served.fail_waiting()

    async def close(self) -> None:
        """Stops every engine after its running batch."""
        self.metrics.ready.set(0)
        self._settled = False
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
    """Exempts everything that is loaded by now from garbage collection, and has the rest collected a little at a time.

    What is loaded stays until the end, so walking it finds nothing; the pauses for it were the slowest answers.
    """
    gc.unfreeze()  # a model that has been exchanged for a newer one is garbage by now
    gc.collect()
    gc.freeze()
    # Once more, of nothing: a full collection waits until there is a quarter of what the last one has left.
    gc.collect()
    # To free 5,000 objects stops the event loop for a millisecond, 50,000 for 60. There are few: no request leaves any of ours.
    gc.set_threshold(5_000, 10, 10)
