"""Requests to engine calls, image by image.

A request becomes (seed, class) items. A batch leaves as soon as the engine is idle, and the next one gathers while the engine
is busy. It takes one item of each waiting request in turn: a request of 64 cannot starve one of 1. Noise comes from seeds, so
an image does not depend on the batch it runs in.

Requests come and go on the event loop. The thread of the device takes batches by itself, so what waits changes under its lock.
"""

import asyncio
import functools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from uni_instruct.class_mixture import ClassIds, ClassMixture
from uni_instruct.engine import Engine
from uni_instruct.errors import UniInstructError
from uni_instruct.generate import image_size
from uni_instruct.noise import NoisePoint, noise_of_points
from uni_instruct.serve.batching.batch_sizes import BatchSizes
from uni_instruct.serve.batching.deadlines import Deadlines
from uni_instruct.serve.batching.device_thread import DeviceThread, EngineCall
from uni_instruct.serve.batching.queued_request import QueuedImage, QueuedRequest, batch_inputs
from uni_instruct.serve.errors import EngineFailedError, QueueFullError, StoppingError, TimedOutError
from uni_instruct.serve.metrics import ModelMetrics

logger = logging.getLogger(__name__)

_MAX_RETRY_AFTER_S = 60
# Up to so many numbers of a request's noise, 25 us, are drawn on the event loop. NumPy lets go of the interpreter for each row
# that it draws, and a thread that wants it back from a busy loop may wait for 5 ms: a batch of 64 was late by half of its time.
_DRAWN_EARLY = 4096


@dataclass(frozen=True)
class Generated:
    """Images uint8 [N, H, W, C] in the order of the request, and the times waited and run, which add up to the total."""

    images: np.ndarray
    queue_ms: float
    model_ms: float


class Batcher:
    """Runs an engine in the thread of its device, at most `batch_sizes[-1]` images at a time.

    queue_images: how many images may wait, over all requests.
    """

    def __init__(
        self,
        engine: Engine,
        batch_sizes: Sequence[int],
        queue_images: int,
        metrics: ModelMetrics,
        device: DeviceThread,
    ):
        self.batch_sizes = tuple(batch_sizes)
        self._sizes = BatchSizes(batch_sizes)
        self._engine = engine
        self._image_size = image_size(engine.spec)
        self._queue_images = queue_images
        self._metrics = metrics
        self._requests: deque[QueuedRequest] = deque()  # with items that the engine has not been handed
        self._again: deque[list[QueuedImage]] = deque()  # of a batch that failed, to be run one by one
        self._queued = 0
        self._mixing: set[QueuedRequest] = (
            set()
        )  # the requests for mixtures of classes: rare, and nothing is looked at without any
        self._device = device
        self._asking = False
        self._running = 0
        self._idle: asyncio.Future[None] | None = None
        self._deadlines: Deadlines[QueuedRequest] = Deadlines(self._expire)
        self._closed = False

    @property
    def running(self) -> bool:
        """Whether requests are still taken from the queue."""
        return not self._closed and self._device.alive

    async def submit(self, seeds: Sequence[NoisePoint], class_ids: ClassIds | None, timeout_s: float) -> Generated:
        """Images of the seeds, or of places between two.

        class_ids: int64 [N], mixtures where the engine has them, None for an unconditional generator.

        Cancelling frees its place.
        Raises QueueFullError, TimedOutError, EngineFailedError, or StoppingError once closed.
        """
        start = time.perf_counter()
        with self._device.lock:
            self._check_room(len(seeds))
            request = self._enqueue(seeds, class_ids, timeout_s)
        try:
            await request.done
        except asyncio.CancelledError:
            self._drop(request, "cancelled")  # the client has left: the engine's time goes to those who still wait
            raise
        except UniInstructError:
            # The error knows this frame by its traceback, and the frame the error by its request: it would outlive its answer.
            del request
            raise
        self._deadlines.remove(request)
        self._mixing.discard(request)
        assert request.images is not None
        total_s = time.perf_counter() - start
        # Waiting is what remains: a large request waits between its batches too, not only before the first.
        return Generated(request.images, queue_ms=1e3 * max(0.0, total_s - request.model_s), model_ms=1e3 * request.model_s)

    async def close(self) -> None:
        """Stops after the running batch, which is still answered; what waits ends in StoppingError."""
        self._closed = True
        self.fail_waiting(begun=True)
        with self._device.lock:
            if self._running:
                self._idle = asyncio.get_running_loop().create_future()
        if self._idle is not None:
            await self._idle

    def fail_waiting(self, *, begun: bool = False) -> None:
        """Ends what waits in StoppingError; requests of which the engine has made a part only where `begun` says so."""
        with self._device.lock:
            for request in list(self._requests):
                if begun or request.next == 0:
                    self._fail(request, StoppingError(), "stopping")

    def _check_room(self, images: int) -> None:
        if self._closed:
            raise StoppingError
        # Refused at once rather than late: whoever waits longer than the timeout would get nothing, and hold up the others.
        if self._queued + images > self._queue_images:
            self._metrics.dropped["queue_full"].inc(images)
            raise QueueFullError(self._queued, self._queue_images, self._retry_after_s())

    def _enqueue(self, seeds: Sequence[NoisePoint], class_ids: ClassIds | None, timeout_s: float) -> QueuedRequest:
        loop = asyncio.get_running_loop()
        shape = self._engine.spec.noise_shape
        drawn = noise_of_points(seeds, shape) if len(seeds) * math.prod(shape) <= _DRAWN_EARLY else None
        mixture = class_ids if isinstance(class_ids, ClassMixture) else None
        first_ids = class_ids.class_ids if isinstance(class_ids, ClassMixture) else class_ids
        request = QueuedRequest(seeds, first_ids, mixture, drawn, loop.create_future(), timeout_s, left=len(seeds))
        if mixture is not None:
            self._mixing.add(request)
        self._requests.append(request)
        self._deadlines.add(request, loop.time() + timeout_s)
        self._count(len(seeds))
        self._ask()
        return request

    def _ask(self) -> None:
        if not self._asking:
            self._asking = True
            self._device.ask(self._turn)

    def _turn(self) -> EngineCall | None:
        """The next batch, as a job for the device's thread. No timer collects requests into fuller batches.

        While the engine runs, the next batch gathers by itself, and an idle engine has nothing to gain from making the first
        request wait.
        """
        self._asking = False
        items = self._again.popleft() if self._again else self._gather()
        if self._again or self._requests:
            self._ask()
        if not items:
            return None
        self._running += 1
        return EngineCall(functools.partial(self._run, items), self._sizes.expected_s(len(items)))

    def _gather(self) -> list[QueuedImage]:
        """The next batch: one item of each request in turn, until it is full or nothing waits."""
        items: list[QueuedImage] = []
        most = self._sizes.best_size_of(self._queued)
        while self._requests and len(items) < most:
            # Round robin: from the front, and to the back as long as items are left, so that every request moves on.
            request = self._requests.popleft()
            items.append((request, request.next))
            request.next += 1
            if request.next < len(request.seeds):
                self._requests.append(request)
        self._count(-len(items))
        return items

    def _run(self, items: list[QueuedImage]) -> Callable[[], None]:
        """In the engine's thread: makes the images, or finds out why not."""
        start = time.perf_counter()
        try:
            images = self._call(items)
        except Exception as error:  # a runtime's errors share no class
            return functools.partial(self._failed, items, error)
        return functools.partial(self._made, items, images, time.perf_counter() - start)

    def _call(self, items: list[QueuedImage]) -> np.ndarray:
        """Images uint8 [len(items), H, W, C]."""
        # Padded to a size that ran before: a runtime may plan memory or compile anew for a shape that it sees first.
        size = self._sizes.size_for(len(items))
        inputs = batch_inputs(self._engine.spec, items, mixing=bool(self._mixing))
        images = self._engine(*(inputs if size == len(items) else inputs.padded(size)))
        # Images are dealt out by index below: one too few would go to the wrong client.
        expected = (size, *self._image_size)
        if images.shape != expected or images.dtype != np.uint8:
            raise EngineFailedError(
                f"engine {self._engine.id} gave {images.dtype} {images.shape} for uint8 {expected}",
                remedy="export the bundle again",
            )
        return images

    def _made(self, items: list[QueuedImage], images: np.ndarray, seconds: float) -> None:
        """Deals the images of a batch out."""
        self._metrics.batch.observe(len(items))
        self._sizes.note(len(items), seconds)
        for request in {request for request, _ in items}:
            request.model_s += seconds
        finished = 0
        for (request, index), image in zip(items, images, strict=False):  # what is left of the images is padding
            finished += self._deliver(request, index, image)
        self._metrics.images.inc(finished)
        self._over()

    def _deliver(self, request: QueuedRequest, index: int, image: np.ndarray) -> int:
        """Gives one image to its request, and says how many the request has got where it was the last."""
        if len(request.seeds) == 1:
            request.images = image[None]
        else:
            if request.images is None:
                request.images = np.empty((len(request.seeds), *self._image_size), dtype=np.uint8)
            request.images[index] = image
        request.left -= 1
        if request.left or request.done.done():
            return 0
        request.done.set_result(None)
        return len(request.seeds)

    def _failed(self, items: list[QueuedImage], error: Exception) -> None:
        """A batch that failed is run again item by item, so that only the bad items fail."""
        if len(items) == 1:
            self._fail_item(items[0], error)
        else:
            logger.warning("a batch of %d images failed (%s); running them one by one", len(items), error)
            with self._device.lock:
                # Of a request that has failed meanwhile, or whose client has left, the others need not be tried.
                self._again.extend([item] for item in items if not item[0].done.done())
                self._ask()
        self._over()

    def _over(self) -> None:
        with self._device.lock:
            self._running -= 1
        self._note_idle()

    def _note_idle(self) -> None:
        with self._device.lock:  # between two batches of the thread neither would be there
            idle = not self._running and not self._again
        if idle and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _fail_item(self, item: QueuedImage, error: Exception) -> None:
        request, index = item
        logger.error("the engine failed on seed %s", request.seeds[index], exc_info=error)
        failure = EngineFailedError(
            f"the engine failed on seed {request.seeds[index]}: {error}", remedy="the server's log says more"
        )
        self._fail(request, failure, "failed")

    def _expire(self, request: QueuedRequest) -> None:
        problem = f"{len(request.seeds)} images were not made in {request.timeout_s:g} s"
        self._fail(request, TimedOutError(problem, remedy="ask for fewer at once, or try later"), "timeout")

    def _fail(self, request: QueuedRequest, error: UniInstructError, reason: str) -> None:
        if not request.done.done():
            request.done.set_exception(error)
        self._drop(request, reason)

    def _drop(self, request: QueuedRequest, reason: str) -> None:
        """Takes what is left of a request out of the queue."""
        self._deadlines.remove(request)
        self._metrics.dropped[reason].inc(request.left)
        with self._device.lock:
            # It is not there where its last item is with the engine; that image is made and thrown away.
            if request in self._requests:
                self._requests.remove(request)
                self._count(request.next - len(request.seeds))
            if self._again:
                self._again = deque(items for items in self._again if items[0][0] is not request)
        self._note_idle()

    def _count(self, images: int) -> None:
        self._queued += images
        # Added, not set: while one model takes another's place, two batchers share the gauge.
        self._metrics.queue.inc(images)

    def _retry_after_s(self) -> int:
        """When the queue is likely to be empty: the images in it, at the engine's present speed."""
        expected_s = self._queued * self._sizes.image_s
        return 1 if not math.isfinite(expected_s) else min(_MAX_RETRY_AFTER_S, max(1, math.ceil(expected_s)))
