"""The generator that is served: it loads while the server already answers, and is ready once it is warm."""

import asyncio
import gc
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine, Selection, load_engine, select_engine
from uni_instruct.errors import UniInstructError
from uni_instruct.generate import image_size
from uni_instruct.images import IMAGE_FORMATS, encode
from uni_instruct.serve.batcher import Batcher, prewarm
from uni_instruct.serve.errors import NotReadyError
from uni_instruct.serve.metrics import ServerMetrics
from uni_instruct.serve.settings import Settings
from uni_instruct.spec import ModelSpec

logger = logging.getLogger(__name__)

# Few: encoders compete with the engine for the cores, and the engine is what requests wait for.
_ENCODER_THREADS = 2


class Backend:
    """One worker's engine, batcher and encoders. Nothing is loaded before `load`."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.metrics = ServerMetrics()
        self.failure: UniInstructError | None = None
        self.encoders = ThreadPoolExecutor(_ENCODER_THREADS, thread_name_prefix="encode")
        self.ready = False
        self._bundle: Bundle | None = None
        self._engine: Engine | None = None
        self._selection: Selection | None = None
        self._batcher: Batcher | None = None

    @property
    def bundle(self) -> Bundle:
        """What is served. Raises NotReadyError until it is loaded."""
        if self._bundle is None:
            raise self._not_ready()
        return self._bundle

    @property
    def engine(self) -> Engine:
        """What runs it. Raises NotReadyError until it is loaded."""
        if self._engine is None:
            raise self._not_ready()
        return self._engine

    @property
    def selection(self) -> Selection:
        """Why this engine runs it. Raises NotReadyError until it is loaded."""
        if self._selection is None:
            raise self._not_ready()
        return self._selection

    @property
    def batcher(self) -> Batcher:
        """What takes requests. Raises NotReadyError until everything is ready, and once it is closed."""
        if self._batcher is None or not self.ready:
            raise self._not_ready()
        return self._batcher

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The prewarmed batch sizes. Raises NotReadyError until they are measured."""
        if self._batcher is None:
            raise self._not_ready()
        return self._batcher.batch_sizes

    @property
    def alive(self) -> bool:
        """False where only a restart helps: loading failed, or the queue is no longer served."""
        return self.failure is None and (self._batcher is None or self._batcher.running)

    async def load(self) -> None:
        """Opens the bundle and its engine and warms it up, in a thread. What goes wrong is kept in `failure`."""
        try:
            bundle, selection, engine = await asyncio.to_thread(self._open)
            batch_sizes = await asyncio.to_thread(prewarm, engine, self.settings.max_batch, self.settings.max_batch_ms / 1e3)
            await asyncio.to_thread(warm_encoders, bundle.spec)
            self._bundle, self._selection, self._engine = bundle, selection, engine
            self.metrics.engine.labels(str(engine.id)).set(1)
            self._batcher = Batcher(engine, batch_sizes, self.settings.queue_images, self.metrics)
        except UniInstructError as error:
            self.failure = error
            logger.error("the generator could not be loaded: %s", error)
        # Whatever else a runtime raises must not end the process: /livez then says 503, and whoever watches it restarts.
        except Exception as error:
            self.failure = UniInstructError(
                f"{type(error).__name__} while loading: {error}", remedy="the server's log says more"
            )
            logger.exception("the generator could not be loaded")

    def mark_ready(self) -> None:
        """To be called once everything that lives as long as the server has been loaded."""
        if self.failure is None:
            settle_garbage_collector()
            self.metrics.ready.set(1)
            self.ready = True
            logger.info("serving %s with %s", self.bundle.spec.name, self.engine.id)

    async def close(self) -> None:
        """Stops the engine after its running batch."""
        self.metrics.ready.set(0)
        if self._batcher is not None:
            await self._batcher.close()
            self.engine.close()
        self.ready = False
        self.encoders.shutdown()

    def _open(self) -> tuple[Bundle, Selection, Engine]:
        bundle = Bundle.open(self.settings.bundle)
        bundle.check_makes_pictures()
        selection = select_engine(bundle, self.settings.engine, self.settings.device)
        # Spinning threads would take the cores from the event loop and the encoders (docs/engines.md, "Threads").
        stored = bundle.engines().get(selection.engine_id, selection.engine_id)
        return bundle, selection, load_engine(bundle, stored, device=selection.device, spin=False)

    def _not_ready(self) -> NotReadyError:
        if self.failure is not None:
            return NotReadyError(f"the generator could not be loaded: {self.failure.problem}", remedy=self.failure.remedy)
        return NotReadyError("the generator is loading", remedy="wait for /readyz to answer 200")


def warm_encoders(spec: ModelSpec) -> None:
    """Encodes a black image in every format: Pillow imports a format's code when it is first used."""
    for name in IMAGE_FORMATS:
        encode(np.zeros(image_size(spec), dtype=np.uint8), name)


def settle_garbage_collector() -> None:
    """Exempts everything that is loaded by now from garbage collection, and makes collections rare.

    What is loaded stays until the end, so walking it finds nothing; the pauses for it were the slowest answers.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
