"""The generators of one worker, by name: loaded one after the other while the server already answers."""

import gc
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from uni_instruct.serve.batcher import DeviceThreads
from uni_instruct.serve.errors import UnknownModelError
from uni_instruct.serve.metrics import ServerMetrics
from uni_instruct.serve.served_model import ServedModel, State
from uni_instruct.serve.settings import Settings
from uni_instruct.serve.sources import sources_by_name

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
        self.ready = False
        self._devices = DeviceThreads()
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

    @contextmanager
    def using(self, name: str | None = None) -> Iterator[ServedModel]:
        """The same, for making images: within the block it is not closed, even if a newer one takes its place."""
        with self.get(name).lease() as served:
            yield served

    async def load(self) -> None:
        """Loads all, the default first; one at a time, as each measures which batch sizes are fast enough."""
        for name, served in self._served.items():
            await served.load()
            self._report(name)

    def mark_ready(self) -> None:
        """To be called once everything that lives as long as the server has been loaded."""
        if "ready" in self.states.values():
            settle_garbage_collector()
            self.metrics.ready.set(1)
            self.ready = True

    async def close(self) -> None:
        """Stops every engine after its running batch."""
        self.metrics.ready.set(0)
        self.ready = False
        for served in self._served.values():
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


def settle_garbage_collector() -> None:
    """Exempts everything that is loaded by now from garbage collection, and makes collections rare.

    What is loaded stays until the end, so walking it finds nothing; the pauses for it were the slowest answers.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
