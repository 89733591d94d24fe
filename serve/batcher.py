"""Requests to engine calls, image by image.

A request becomes (seed, class) items. A batch leaves as soon as the engine is idle, and the next one gathers while the engine
is busy. It takes one item of each waiting request in turn: a request of 64 cannot starve one of 1. Noise comes from seeds, so
an image does not depend on the batch it runs in.

All of this runs on the event loop, engine calls apart: no lock is needed, since nothing changes between two `await`s.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from uni_instruct.engine import Engine
from uni_instruct.generate import image_size
from uni_instruct.noise import NoisePoint, class_ids_in_turn, draw_inputs
from uni_instruct.serve.errors import EngineFailedError, QueueFullError, StoppingError, TimedOutError
from uni_instruct.serve.metrics import ModelMetrics

logger = logging.getLogger(__name__)

# Weight of the newest batch in the running mean of the time per image: it follows a change of load within some ten batches.
_MEAN_WEIGHT = 0.2
_LONGEST_RETRY_S = 60


@dataclass(frozen=True)
class Generated:
    """Images uint8 [N, H, W, C] in the order of the request, and the times waited and run, which add up to the total."""

    images: np.ndarray
    queue_ms: float
    model_ms: float


@dataclass(eq=False)
class _Ticket:
    """A request in the queue: items from `next` on have not been handed to the engine, `left` items have no image yet.

    model_s adds up the engine calls that the request took part in.
    """

    seeds: Sequence[NoisePoint]
    class_ids: np.ndarray
    images: np.ndarray
    done: asyncio.Future[None]
    left: int
    next: int = 0
    model_s: float = 0.0


_Item = tuple[_Ticket, int]


class DeviceThread:
    """The one thread that runs engines on a device; batchers take turns, in the order in which they ask."""

    def __init__(self) -> None:
        # One thread: a second call at the same time would only share the same cores.
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="engine")
        # Taken before a batch is gathered, not after: while one model runs, the batches of the others go on filling.
        self.turn = asyncio.Lock()


class DeviceThreads:
    """A DeviceThread for each device, made when first asked for."""

    def __init__(self) -> None:
        self._threads: dict[str, DeviceThread] = {}

    def of(self, device: str) -> DeviceThread:
        """The thread of that device, such as 'cpu' or 'cuda:0'."""
        return self._threads.setdefault(device, DeviceThread())

    def close(self) -> None:
        """Ends the threads, after the calls that run."""
        for thread in self._threads.values():
            thread.pool.shutdown()


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
        self._engine = engine
        self._queue_images = queue_images
        self._metrics = metrics
        self._tickets: deque[_Ticket] = deque()
        self._queued = 0
        self._image_s = 0.0  # a running mean of the engine's time per image
        self._wake = asyncio.Event()
        self._device = device
        self._closed = False
        self._loop = asyncio.create_task(self._run())

    @property
    def running(self) -> bool:
        """Whether requests are still taken from the queue."""
        return not self._loop.done()

    async def submit(self, seeds: Sequence[NoisePoint], class_ids: np.ndarray | None, timeout_s: float) -> Generated:
        """Images of the seeds, or of places between two. class_ids: int64 [N], None for an unconditional generator.

        Cancelling frees its place.
        Raises QueueFullError, TimedOutError, EngineFailedError, or StoppingError once closed.
        """
        if self._closed:
            raise StoppingError
        # Refused at once rather than late: whoever waits longer than the timeout would get nothing, and hold up the others.
        if self._queued + len(seeds) > self._queue_images:
            self._metrics.dropped["queue_full"].inc(len(seeds))
            raise QueueFullError(self._queued, self._queue_images, self._retry_after_s())
        ticket = self._enqueue(seeds, class_ids)
        start = time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                await ticket.done
        except TimeoutError:
            self._drop(ticket, "timeout")
            raise TimedOutError(
                f"{len(seeds)} images were not made in {timeout_s:g} s", remedy="ask for fewer at once, or try later"
            ) from None
        except asyncio.CancelledError:
            self._drop(ticket, "cancelled")  # the client has left: the engine's time goes to those who still wait
            raise
        total_s = time.perf_counter() - start
        # Waiting is what remains: a large request waits between its batches too, not only before the first.
        return Generated(ticket.images, queue_ms=1e3 * max(0.0, total_s - ticket.model_s), model_ms=1e3 * ticket.model_s)

    async def close(self) -> None:
        """Stops after the running batch, which is still answered; what waits ends in StoppingError."""
        self._closed = True
        self.turn_away(begun=True)
        self._wake.set()
        await self._loop

    def turn_away(self, *, begun: bool = False) -> None:
        """Ends what waits in StoppingError; requests of which the engine has made a part only where `begun` says so."""
        for ticket in list(self._tickets):
            if begun or ticket.next == 0:
                self._fail(ticket, StoppingError(), "stopping")

    async def _run(self) -> None:
        while not self._closed:
            await self._wake.wait()
            # No timer collects requests into fuller batches: while the engine ran, the next batch has gathered by itself, and
            # an idle engine has nothing to gain from making the first request wait.
            async with self._device.turn:
                items = self._gather()
                if items:
                    await self._run_batch(items)
                else:
                    self._wake.clear()

    def _gather(self) -> list[_Item]:
        """The next batch: one item of each request in turn, until it is full or nothing waits."""
        items: list[_Item] = []
        while self._tickets and len(items) < self.batch_sizes[-1]:
            # Round robin: from the front, and to the back as long as items are left, so that every request moves on.
            ticket = self._tickets.popleft()
            items.append((ticket, ticket.next))
            ticket.next += 1
            if ticket.next < len(ticket.seeds):
                self._tickets.append(ticket)
        self._count(-len(items))
        return items

    async def _run_batch(self, items: list[_Item]) -> None:
        """Delivers a batch. One that fails is run again item by item, so that only the bad items fail."""
        try:
            images, seconds = await asyncio.get_running_loop().run_in_executor(self._device.pool, self._call, items)
        except Exception as error:  # a runtime's errors share no class
            if len(items) == 1:
                self._fail_item(items[0], error)
                return
            logger.warning("a batch of %d images failed (%s); running them one by one", len(items), error)
            for item in items:
                if not item[0].done.done():  # its request may have failed by another item, or its client have left
                    await self._run_batch([item])
            return
        self._metrics.batch.observe(len(items))
        self._image_s += _MEAN_WEIGHT * (seconds / len(items) - self._image_s)
        for ticket in {ticket for ticket, _ in items}:
            ticket.model_s += seconds
        for (ticket, index), image in zip(items, images, strict=True):
            self._deliver(ticket, index, image)

    def _call(self, items: list[_Item]) -> tuple[np.ndarray, float]:
        """In the engine's thread: images uint8 [len(items), H, W, C], and the seconds they took."""
        start = time.perf_counter()
        seeds = [ticket.seeds[index] for ticket, index in items]
        # Padded to a size that ran before: a runtime may plan memory or compile anew for a shape that it sees first.
        size = next(size for size in self.batch_sizes if size >= len(items))
        class_ids = np.array([ticket.class_ids[index] for ticket, index in items], dtype=np.int64)
        # What a request may ask for was checked when it came in.
        inputs = draw_inputs(self._engine.spec, seeds, class_ids if self._engine.spec.num_classes else None)
        images = self._engine(*inputs.padded(size))
        # Images are dealt out by index below: one too few would go to the wrong client.
        expected = (size, *image_size(self._engine.spec))
        if images.shape != expected or images.dtype != np.uint8:
            raise EngineFailedError(
                f"engine {self._engine.id} gave {images.dtype} {images.shape} for uint8 {expected}",
                remedy="export the bundle again",
            )
        return images[: len(items)], time.perf_counter() - start

    def _enqueue(self, seeds: Sequence[NoisePoint], class_ids: np.ndarray | None) -> _Ticket:
        images = np.empty((len(seeds), *image_size(self._engine.spec)), dtype=np.uint8)
        labels = np.zeros(len(seeds), dtype=np.int64) if class_ids is None else class_ids
        done = asyncio.get_running_loop().create_future()
        ticket = _Ticket(seeds, labels, images, done, left=len(seeds))
        self._tickets.append(ticket)
        self._count(len(seeds))
        self._wake.set()
        return ticket

    def _deliver(self, ticket: _Ticket, index: int, image: np.ndarray) -> None:
        ticket.images[index] = image
        ticket.left -= 1
        if ticket.left == 0 and not ticket.done.done():
            self._metrics.images.inc(len(ticket.seeds))
            ticket.done.set_result(None)

    def _fail_item(self, item: _Item, error: Exception) -> None:
        ticket, index = item
        logger.error("the engine failed on seed %s", ticket.seeds[index], exc_info=error)
        failure = EngineFailedError(
            f"the engine failed on seed {ticket.seeds[index]}: {error}", remedy="the server's log says more"
        )
        self._fail(ticket, failure, "failed")

    def _fail(self, ticket: _Ticket, error: Exception, reason: str) -> None:
        if not ticket.done.done():
            ticket.done.set_exception(error)
        self._drop(ticket, reason)

    def _drop(self, ticket: _Ticket, reason: str) -> None:
        """Takes what is left of a request out of the queue."""
        self._metrics.dropped[reason].inc(ticket.left)
        # It is not there where its last item is with the engine; that image is made and thrown away.
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self._count(ticket.next - len(ticket.seeds))

    def _count(self, images: int) -> None:
        self._queued += images
        # Added, not set: while one model takes another's place, two batchers share the gauge.
        self._metrics.queue.inc(images)

    def _retry_after_s(self) -> int:
        """When the queue is likely to be empty: the images in it, at the engine's present speed."""
        return min(_LONGEST_RETRY_S, max(1, math.ceil(self._queued * self._image_s)))


def prewarm(engine: Engine, max_batch: int, max_batch_s: float) -> tuple[int, ...]:
    """The batch sizes to run, powers of two: as large as pays while one batch holds the engine for at most max_batch_s.

    Each is run before it is admitted, so that no request pays for a first call.
    """
    # A small request behind a large batch waits for all of it, so the bound on a batch's time is a bound on that wait.
    # With powers of two at most half of a call is padding, and few shapes have to be warmed up.
    sizes: list[int] = []
    size = 1
    while size <= max_batch:
        inputs = draw_inputs(engine.spec, range(size), class_ids_in_turn(engine.spec, size))
        engine(*inputs)
        start = time.perf_counter()
        engine(*inputs)
        if sizes and time.perf_counter() - start > max_batch_s:
            break
        sizes.append(size)
        size *= 2
    return tuple(sizes)
