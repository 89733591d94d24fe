"""The generator that is served: loads while the server already answers, then makes images and encodes them."""

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine, Selection, load_engine, select_engine
from uni_instruct.errors import UniInstructError
from uni_instruct.generate import image_size
from uni_instruct.images import IMAGE_FORMATS, encode
from uni_instruct.serve.batcher import Batcher, Generated, prewarm
from uni_instruct.serve.errors import NotReadyError
from uni_instruct.serve.metrics import Metrics
from uni_instruct.serve.responses import Answer, encode_job, job_headers
from uni_instruct.serve.schema import Job
from uni_instruct.serve.settings import Settings
from uni_instruct.spec import ModelSpec

logger = logging.getLogger(__name__)

_ENCODER_THREADS = 2

EncodedImages = TypeVar("EncodedImages")


class Backend:
    """One worker's engine, batcher and encoders. Nothing is loaded before `load`."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.metrics = Metrics()
        self.failure: UniInstructError | None = None
        self._bundle: Bundle | None = None
        self._engine: Engine | None = None
        self._selection: Selection | None = None
        self._batcher: Batcher | None = None
        self._encoders = ThreadPoolExecutor(_ENCODER_THREADS, thread_name_prefix="encode")
        self.ready = False

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

    async def generate(self, seeds: Sequence[int], class_ids: np.ndarray | None) -> Generated:
        """Images of the seeds, through the batcher. Raises NotReadyError, and what Batcher.submit raises."""
        if self._batcher is None or not self.ready:
            raise self._not_ready()
        return await self._batcher.submit(seeds, class_ids, self.settings.timeout_s)

    async def make(
        self, seeds: Sequence[int], class_ids: np.ndarray | None, encoder: Callable[[np.ndarray], EncodedImages]
    ) -> tuple[EncodedImages, dict[str, float]]:
        """What `encoder` makes of the images in an encoder thread, and the milliseconds by stage."""
        made = await self.generate(seeds, class_ids)
        start = time.perf_counter()
        encoded = await asyncio.get_running_loop().run_in_executor(self._encoders, encoder, made.images)
        encode_ms = 1e3 * (time.perf_counter() - start)
        stages = {"queue": made.queue_ms, "model": made.model_ms, "encode": encode_ms}
        for stage, milliseconds in stages.items():
            self.metrics.stage.labels(stage).observe(milliseconds / 1e3)
        return encoded, stages

    async def answer(self, job: Job) -> Answer:
        """The encoded images of a job, with headers that name seeds, classes, engine and milliseconds by stage."""
        spec = self.bundle.spec
        (body, media_type), stages = await self.make(job.seeds, job.class_ids, lambda images: encode_job(job, images, spec))
        timing = ", ".join(f"{stage};dur={milliseconds:.2f}" for stage, milliseconds in stages.items())
        headers = {**job_headers(job), "X-Engine": str(self.engine.id), "Server-Timing": timing}
        if refused := self.selection.refused:
            headers["X-Engines-Refused"] = ",".join(str(standing.engine_id) for standing in refused)
        return Answer(body, media_type, headers)

    async def close(self) -> None:
        """Stops the engine after its running batch."""
        self.metrics.ready.set(0)
        if self._batcher is not None:
            await self._batcher.close()
            self.engine.close()
        self.ready = False
        self._encoders.shutdown()

    def _open(self) -> tuple[Bundle, Selection, Engine]:
        bundle = Bundle.open(self.settings.bundle)
        bundle.check_makes_pictures()
        selection = select_engine(bundle, self.settings.engine)
        return bundle, selection, load_engine(bundle, bundle.engines().get(selection.engine_id), spin=False)

    def _not_ready(self) -> NotReadyError:
        if self.failure is not None:
            return NotReadyError(f"the generator could not be loaded: {self.failure.problem}", remedy=self.failure.remedy)
        return NotReadyError("the generator is loading", remedy="wait for /readyz to answer 200")


def warm_encoders(spec: ModelSpec) -> None:
    """Encodes a black image in every format: Pillow imports a format's code when it is first used."""
    for name in IMAGE_FORMATS:
        encode(np.zeros(image_size(spec), dtype=np.uint8), name)


def settle_garbage_collector() -> None:
    """What is loaded by now stays, so the collector need not walk it: its pauses were the slowest answers."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
