"""The batcher: it combines requests into engine calls, image by image.

A request is a list of items, one for each image. A batch starts as soon as the engine is idle, and the next one fills while the
engine is busy. A batch takes one item of each waiting request in turn, so that a request of 64 images cannot starve one of 1.
Noise depends only on the seed, so an image does not depend on the batch in which it is made.

Requests are added and removed on the event loop, while the device's thread takes batches. Both change the queue, so every
change of it holds the lock of the DeviceThread.
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
from uni_instruct.noise import Between, NoisePoint, noise_at_points
from uni_instruct.serve.batching.batch_sizes import BatchSizes
from uni_instruct.serve.batching.deadlines import Deadlines
from uni_instruct.serve.batching.device_thread import DeviceThread, EngineCall
from uni_instruct.serve.batching.queued_request import QueuedImage, QueuedRequest, batch_inputs
from uni_instruct.serve.errors import EngineFailedError, QueueFullError, StoppingError, TimedOutError
from uni_instruct.serve.metrics import ModelMetrics

logger = logging.getLogger(__name__)

_MAX_RETRY_AFTER_S = 60
# Noise of up to this many values (25 us) is drawn on the event loop when a request comes in. In the engine's thread NumPy
# releases the GIL for every row that it draws, and may wait up to 5 ms to get it back from a busy event loop. That made a batch
# of 64 late by half of its own time.
_MAX_EARLY_NOISE = 4096


@dataclass(frozen=True)
class Generated:
    """Images uint8 [N, H, W, C] in the order of the request, and the milliseconds waited and run, which add up to the total."""

    images: np.ndarray
    queue_ms: float
    model_ms: float


class Batcher:
    """Runs an engine in the thread of its device, with at most `batch_sizes[-1]` images in one call.

    queue_images: how many images may wait, summed over all requests.
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
        self._requests: deque[QueuedRequest] = deque()  # requests with items that have not been given to the engine
        self._retries: deque[list[QueuedImage]] = deque()  # batches of one item each, from a batch that failed
        self._queued = 0
        self._mixture_requests: set[QueuedRequest] = (
            set()
        )  # requests for mixtures of classes; they are rare, and while there are none, no item is checked for a mixture
        self._device = device
        self._turn_requested = False
        self._running = 0
        self._idle: asyncio.Future[None] | None = None
        self._deadlines: Deadlines[QueuedRequest] = Deadlines(self._expire)
        self._closed = False

    @property
    def running(self) -> bool:
        """Whether requests in the queue are still processed."""
        return not self._closed and self._device.alive

    async def submit(self, seeds: Sequence[NoisePoint], class_ids: ClassIds | None, timeout_s: float) -> Generated:
        """Queue a request and return its images. seeds: N seeds, or points between two seeds.

        class_ids: int64 [N]; or mixtures, if the engine mixes classes; None for an unconditional generator.
        timeout_s: seconds until the request fails, waiting included.

        Cancelling this call removes the request from the queue.
        Raises QueueFullError, TimedOutError, EngineFailedError, or StoppingError once the batcher is closed.
        """
        start = time.perf_counter()
        with self._device.lock:
            self._check_room(len(seeds))
            request = self._enqueue(seeds, class_ids, timeout_s)
        try:
            await request.done
        except asyncio.CancelledError:
            self._drop(request, "cancelled")  # the client has left, so spend the engine's time on those that still wait
            raise
        except UniInstructError:
            # The error refers to this frame through its traceback, and the frame to the error through `request`. Break this
            # reference cycle, or the request's memory would be kept until the next garbage collection.
            del request
            raise
        self._deadlines.remove(request)
        self._mixture_requests.discard(request)
        assert request.images is not None
        total_s = time.perf_counter() - start
        # The waiting time is the rest of the total: a large request waits between its batches too, not only before the first.
        return Generated(request.images, queue_ms=1e3 * max(0.0, total_s - request.model_s), model_ms=1e3 * request.model_s)

    async def close(self) -> None:
        """Stop after the running batch, whose requests are still answered. Requests that wait end with StoppingError."""
        self._closed = True
        self.fail_waiting(begun=True)
        with self._device.lock:
            if self._running:
                self._idle = asyncio.get_running_loop().create_future()
        if self._idle is not None:
            await self._idle

    def fail_waiting(self, *, begun: bool = False) -> None:
        """End waiting requests with StoppingError; those of which a part has been given to the engine only if `begun`."""
        with self._device.lock:
            for request in list(self._requests):
                if begun or request.next == 0:
                    self._fail(request, StoppingError(), "stopping")

    def _check_room(self, images: int) -> None:
        if self._closed:
            raise StoppingError
        # Backpressure: refuse at once. A request that waits longer than its timeout gets no images and delays the others.
        if self._queued + images > self._queue_images:
            self._metrics.dropped["queue_full"].inc(images)
            raise QueueFullError(self._queued, self._queue_images, self._retry_after_s())

    def _enqueue(self, seeds: Sequence[NoisePoint], class_ids: ClassIds | None, timeout_s: float) -> QueuedRequest:
        loop = asyncio.get_running_loop()
        shape = self._engine.spec.noise_shape
        drawn = noise_at_points(seeds, shape) if len(seeds) * math.prod(shape) <= _MAX_EARLY_NOISE else None
        mixture = class_ids if isinstance(class_ids, ClassMixture) else None
        first_ids = class_ids.class_ids if isinstance(class_ids, ClassMixture) else class_ids
        request = QueuedRequest(seeds, first_ids, mixture, drawn, loop.create_future(), timeout_s, left=len(seeds))
        if mixture is not None:
            self._mixture_requests.add(request)
        self._requests.append(request)
        self._deadlines.add(request, loop.time() + timeout_s)
        self._count(len(seeds))
        self._request_turn()
        return request

    def _request_turn(self) -> None:
        # One pending turn is enough: when it comes, `_turn` asks for another one if there is more to do.
        if not self._turn_requested:
            self._turn_requested = True
            self._device.ask(self._turn)

    def _turn(self) -> EngineCall | None:
        """Return the next batch as a job for the device's thread, or None if nothing waits.

        No timer delays a batch to make it fuller: while the engine runs, the next batch fills anyway, and with an idle engine a
        delay would only make the first request wait.
        """
        self._turn_requested = False
        items = self._retries.popleft() if self._retries else self._gather()
        if self._retries or self._requests:
            self._request_turn()
        if not items:
            return None
        self._running += 1
        return EngineCall(functools.partial(self._run, items), self._sizes.expected_s(len(items)))

    def _gather(self) -> list[QueuedImage]:
        """Take the next batch out of the queue: one item of each request in turn, until it is full or nothing waits."""
        items: list[QueuedImage] = []
        most = self._sizes.best_size_of(self._queued)
        while self._requests and len(items) < most:
            # Round robin: a request is taken from the front, and put at the back if it has more items.
            request = self._requests.popleft()
            items.append((request, request.next))
            request.next += 1
            if request.next < len(request.seeds):
                self._requests.append(request)
        self._count(-len(items))
        return items

    def _run(self, items: list[QueuedImage]) -> Callable[[], None]:
        """Make the images of a batch and return the callback for the event loop, `_on_images` or `_on_error`.

        Runs in the engine's thread, or on the event loop if the batch is quick (see DeviceThread).
        """
        start = time.perf_counter()
        try:
            images = self._call(items)
        except Exception as error:  # the runtimes' errors have no common base class
            return functools.partial(self._on_error, items, error)
        return functools.partial(self._on_images, items, images, time.perf_counter() - start)

    def _call(self, items: list[QueuedImage]) -> np.ndarray:
        """Run the engine: images uint8 [size, H, W, C], of which the first len(items) are those of the items."""
        # Padded to a size that has run before: for a new shape, a runtime may plan its memory or compile code again.
        size = self._sizes.size_for(len(items))
        inputs = batch_inputs(self._engine.spec, items, mixing=bool(self._mixture_requests))
        images = self._engine(*(inputs if size == len(items) else inputs.padded(size)))
        # `_on_images` assigns images to requests by their index, so with a wrong number a client would get another one's image.
        expected = (size, *self._image_size)
        if images.shape != expected or images.dtype != np.uint8:
            raise EngineFailedError(
                f"engine {self._engine.id} returned {images.dtype} {images.shape} instead of uint8 {expected}",
                remedy="export the bundle again",
            )
        return images

    def _on_images(self, items: list[QueuedImage], images: np.ndarray, seconds: float) -> None:
        """Give the images of a finished batch to their requests, and record its time."""
        self._metrics.batch.observe(len(items))
        self._sizes.note(len(items), seconds)
        for request in {request for request, _ in items}:
            request.model_s += seconds
        finished = 0
        for (request, index), image in zip(items, images, strict=False):  # the remaining images are padding
            finished += self._deliver(request, index, image)
        self._metrics.images.inc(finished)
        self._batch_done()

    def _deliver(self, request: QueuedRequest, index: int, image: np.ndarray) -> int:
        """Give one image to its request. Return the request's number of images if this was its last one, else 0."""
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

    def _on_error(self, items: list[QueuedImage], error: Exception) -> None:
        """Run a batch that failed again, item by item, so that only the bad items fail. A single item fails for good."""
        if len(items) == 1:
            self._fail_item(items[0], error)
        else:
            logger.warning("a batch of %d images failed (%s); running them one by one", len(items), error)
            with self._device.lock:
                # Skip items of requests that are over, because another item failed, time ran out or the client left.
                self._retries.extend([item] for item in items if not item[0].done.done())
                self._request_turn()
        self._batch_done()

    def _batch_done(self) -> None:
        with self._device.lock:
            self._running -= 1
        self._note_idle()

    def _note_idle(self) -> None:
        with self._device.lock:  # without it, an item that just moves from `_retries` to running could be missed
            idle = not self._running and not self._retries
        if idle and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _fail_item(self, item: QueuedImage, error: Exception) -> None:
        request, index = item
        place = _in_words(request.seeds[index])
        logger.error("the engine failed %s", place, exc_info=error)
        failure = EngineFailedError(f"the engine failed {place}: {error}", remedy="the server's log says more")
        self._fail(request, failure, "failed")

    def _expire(self, request: QueuedRequest) -> None:
        problem = f"{len(request.seeds)} images were not made within {request.timeout_s:g} s"
        self._fail(request, TimedOutError(problem, remedy="ask for fewer at once, or try later"), "timeout")

    def _fail(self, request: QueuedRequest, error: UniInstructError, reason: str) -> None:
        if not request.done.done():
            request.done.set_exception(error)
        self._drop(request, reason)

    def _drop(self, request: QueuedRequest, reason: str) -> None:
        """Remove the rest of a request from the queue, and count its missing images as dropped for that reason."""
        self._deadlines.remove(request)
        self._metrics.dropped[reason].inc(request.left)
        with self._device.lock:
            # A request whose last item is already at the engine is not in the queue; its image is made and discarded.
            if request in self._requests:
                self._requests.remove(request)
                self._count(request.next - len(request.seeds))
            if self._retries:
                self._retries = deque(items for items in self._retries if items[0][0] is not request)
        self._note_idle()

    def _count(self, images: int) -> None:
        self._queued += images
        # Added, not set: while a reload replaces a model, two batchers share this gauge.
        self._metrics.queue.inc(images)

    def _retry_after_s(self) -> int:
        """Return in how many seconds (1 to 60) the queue will probably be empty, at the engine's current speed."""
        expected_s = self._queued * self._sizes.image_s
        return 1 if not math.isfinite(expected_s) else min(_MAX_RETRY_AFTER_S, max(1, math.ceil(expected_s)))


def _in_words(point: NoisePoint) -> str:
    """Say which image it is, for errors and the log."""
    if isinstance(point, Between):
        return f"between seeds {point.start} and {point.end}, at {point.position:.3f}"
    return f"on seed {point}"
