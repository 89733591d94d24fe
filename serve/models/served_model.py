"""One generator that is served: its bundle, the engine that runs it, and the batcher that queues requests for it."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine, Selection, load_engine, select_engine
from uni_instruct.errors import UniInstructError
from uni_instruct.generate import image_size
from uni_instruct.images import IMAGE_FORMATS, encode
from uni_instruct.serve.batching.batch_sizes import prewarm
from uni_instruct.serve.batching.batcher import Batcher
from uni_instruct.serve.batching.device_thread import DeviceThreads
from uni_instruct.serve.errors import NotReadyError
from uni_instruct.serve.metrics import ModelMetrics
from uni_instruct.serve.models.reload import Fingerprint, fingerprint
from uni_instruct.serve.settings import Settings
from uni_instruct.spec import ModelSpec

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "closed"]


class ServedModel:
    """A generator in one worker. `load` loads it; after that it is ready, or `failure` holds the error.

    name: what requests call it. source: a folder, the name of a shipped generator, or an address on the hub. devices (engine
    threads) and encoders (threads that encode images) are shared by all models of the worker.
    """

    def __init__(
        self,
        name: str,
        source: str,
        settings: Settings,
        *,
        metrics: ModelMetrics,
        devices: DeviceThreads,
        encoders: ThreadPoolExecutor,
    ):
        self.name = name
        self.source = source
        self.settings = settings
        self.metrics = metrics
        self.encoders = encoders
        self.failure: UniInstructError | None = None
        # Of the files at the time of `load`, whether it succeeded or not; None before.
        self.fingerprint: Fingerprint | None = None
        self._devices = devices
        self._bundle: Bundle | None = None
        self._engine: Engine | None = None
        self._selection: Selection | None = None
        self._engine_headers: dict[str, str] | None = None
        self._batcher: Batcher | None = None
        self._closed = False
        self.lease = Lease(self)

    @property
    def bundle(self) -> Bundle:
        """The bundle that is served. Raises NotReadyError until it is loaded."""
        if self._bundle is None:
            raise self._not_ready()
        return self._bundle

    @property
    def spec(self) -> ModelSpec:
        """The bundle's spec: image shape, classes, provenance. Raises NotReadyError until it is loaded."""
        return self.bundle.spec

    @property
    def engine(self) -> Engine:
        """The engine that runs it. Raises NotReadyError until it is loaded."""
        if self._engine is None:
            raise self._not_ready()
        return self._engine

    @property
    def engine_headers(self) -> dict[str, str]:
        """Headers of every answer: X-Model, X-Engine, X-Engines-Refused if there are any. Raises NotReadyError until loaded."""
        if self._engine_headers is None:
            headers = {"X-Model": self.name, "X-Engine": str(self.engine.id)}
            if refused := self.selection.refused:
                headers["X-Engines-Refused"] = ",".join(str(status.engine_id) for status in refused)
            self._engine_headers = headers
        return self._engine_headers

    @property
    def selection(self) -> Selection:
        """Why this engine was chosen, and the status of the bundle's others. Raises NotReadyError until it is loaded."""
        if self._selection is None:
            raise self._not_ready()
        return self._selection

    @property
    def batcher(self) -> Batcher:
        """The batcher that takes requests. Raises NotReadyError until it is loaded, and after it is closed."""
        if self._batcher is None or self._closed:
            raise self._not_ready()
        return self._batcher

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The prewarmed batch sizes. Raises NotReadyError until they are measured."""
        if self._batcher is None:
            raise self._not_ready()
        return self._batcher.batch_sizes

    @property
    def state(self) -> State:
        """'loading', 'ready', 'failed' or 'closed'."""
        if self._closed:
            return "closed"
        if self.failure is not None:
            return "failed"
        return "loading" if self._batcher is None else "ready"

    @property
    def alive(self) -> bool:
        """False if only a restart helps: loading failed, or the queue is no longer processed."""
        return self.failure is None and (self._batcher is None or self._batcher.running)

    async def load(self) -> None:
        """Open the bundle and its engine and warm both up, in a thread. An error is not raised but stored in `failure`."""
        # Taken before the files are read, so that a change during the reading is noticed and leads to a reload.
        self.fingerprint = await asyncio.to_thread(fingerprint, self.source)
        try:
            bundle, selection, engine = await asyncio.to_thread(self._open)
            longest_s = self.settings.max_batch_ms / 1e3
            batch_sizes = await asyncio.to_thread(prewarm, engine, self.settings.max_batch, longest_s)
            await asyncio.to_thread(warm_encoders, bundle.spec)
            self._bundle, self._selection, self._engine = bundle, selection, engine
            device = self._devices.of(engine.device)
            self._batcher = Batcher(engine, batch_sizes, self.settings.queue_images, self.metrics, device)
            logger.info("serving %s with %s", self.name, engine.id)
        except UniInstructError as error:
            self.failure = error
            logger.error("the generator %s could not be loaded: %s", self.name, error)
        # Other errors of a runtime must not end the process either: /readyz reports this model, and the others are served.
        except Exception as error:
            self.failure = UniInstructError(
                f"{type(error).__name__} while loading: {error}", remedy="the server's log says more"
            )
            logger.exception("the generator %s could not be loaded", self.name)

    async def drain(self) -> None:
        """Wait until no request holds a lease, then close. New requests must go to another model before this is called."""
        await self.lease.unused.wait()
        await self.close()

    def fail_waiting(self) -> None:
        """End the requests that wait for the engine with 503. Called when the server begins to stop."""
        if self._batcher is not None:
            self._batcher.fail_waiting()

    async def close(self) -> None:
        """Stop the engine after its running batch. Requests that still wait get StoppingError."""
        if self._batcher is not None and not self._closed:
            await self._batcher.close()
            self.engine.close()
        self._closed = True

    def _open(self) -> tuple[Bundle, Selection, Engine]:
        bundle = Bundle.open(self.source)
        bundle.check_makes_pictures()
        selection = select_engine(bundle, self.settings.engine, self.settings.device)
        # spin=False: threads that spin while they wait would take cores from the event loop and the encoders
        # (docs/engines.md, "Threads").
        stored = bundle.engines().get(selection.engine_id, selection.engine_id)
        return bundle, selection, load_engine(bundle, stored, device=selection.device, spin=False)

    def _not_ready(self) -> NotReadyError:
        if self.failure is not None:
            problem = f"the generator {self.name} could not be loaded: {self.failure.problem}"
            return NotReadyError(problem, remedy=self.failure.remedy, param="model")
        if self._closed:
            return NotReadyError("the server is stopping", remedy="use another server")
        return NotReadyError(f"the generator {self.name} is loading", remedy="wait for /readyz to answer 200")


class Lease:
    """A counted lease: `with served.lease:` keeps a model open until the block ends, even if a reload replaces the model."""

    def __init__(self, served: ServedModel):
        self.unused = asyncio.Event()
        self.unused.set()
        self._served, self._count = served, 0

    def __enter__(self) -> ServedModel:
        self._count += 1
        self.unused.clear()
        return self._served

    def __exit__(self, *error: object) -> None:
        self._count -= 1
        if not self._count:
            self.unused.set()


def warm_encoders(spec: ModelSpec) -> None:
    """Encode a black image in every format, because Pillow imports a format's code only when it is first used."""
    for name in IMAGE_FORMATS:
        encode(np.zeros(image_size(spec), dtype=np.uint8), name)
