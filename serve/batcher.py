"""Requests to engine calls, image by image.

A request becomes (seed, class) items. A batch leaves as soon as the engine is idle and gathers while it is busy, taking
one item of each waiting request in turn: a request of 64 cannot starve one of 1. Noise come from seeds, so an image
does not depend on the batch it runs in.
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
from uni_instruct.noise import class_ids_in_turn, draw_inputs
from uni_instruct.serve.errors import EngineFailedError, NotReadyError, QueueFullError, TimedOutError
from uni_instruct.serve.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """Images uint8 [N, H, W, C] in the order of the request, and the times waited and run, which add up."""

    images: np.ndarray
    queue_ms: float
    model_ms: float


@dataclass(eq=False)
class _Ticket:
    """A request in the queue: items from `next` on have not been handed to the engine, `left` have no image yet."""

    seeds: Sequence[int]
    class_ids: np.ndarray
    images: np.ndarray
    done: asyncio.Future[None]
    left: int
    next: int = 0
    model_s: float = 0.0


_Item = tuple[_Ticket, int]


class Batcher:
    """Runs an engine in one thread of its own, at most `batch_sizes[-1]` images at a time.

    queue_images: how many images may wait, over all requests.
    """

    def __init__(self, engine: Engine, batch_sizes: Sequence[int], queue_images: int, metrics: Metrics):
        self.batch_sizes = tuple(batch_sizes)
        self._engine = engine
        self._queue_images = queue_images
        self._metrics = metrics
        self._tickets: deque[_Ticket] = deque()
        self._queued = 0
        self._image_s = 0.0  # a running mean of the engine's time per image
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._closed = False
        self._loop = asyncio.create_task(self._run())

    @property
    def running(self) -> bool:
        """Whether requests are still taken from the queue."""
        return not self._loop.done()

    async def submit(self, seeds: Sequence[int], class_ids: np.ndarray | None, timeout_s: float) -> Generated:
        """Images of the seeds. class_ids: int64 [N], None for an unconditional generator. Cancelling frees its place.

        Raises QueueFullError, TimedOutError, EngineFailedError, or NotReadyError once closed.
        """
        if self._closed:
            raise NotReadyError("the server is stopping", remedy="try another one")
        if self._queued + len(seeds) > self._queue_images:
            self._metrics.dropped.labels("queue_full").inc(len(seeds))
            raise QueueFullError(self._queued, self._queue_images, self._retry_after_s())
        images = np.empty((len(seeds), *image_size(self._engine.spec)), dtype=np.uint8)
        labels = np.zeros(len(seeds), dtype=np.int64) if class_ids is None else class_ids
        done = asyncio.get_running_loop().create_future()
        ticket = _Ticket(seeds, labels, images, done, left=len(seeds))
        start = time.perf_counter()
        self._enqueue(ticket)
        try:
            async with asyncio.timeout(timeout_s):
                await ticket.done
        except TimeoutError:
            self._drop(ticket, "timeout")
            raise TimedOutError(
                f"{len(seeds)} images were not made in {timeout_s:g} s", remedy="ask for fewer at once, or try later"
            ) from None
        except asyncio.CancelledError:
            self._drop(ticket, "cancelled")
            raise
        total_s = time.perf_counter() - start
        return Generated(images, queue_ms=1e3 * max(0.0, total_s - ticket.model_s), model_ms=1e3 * ticket.model_s)

    async def close(self) -> None:
        """Stops after the running batch, which is still answered; what waits ends in NotReadyError."""
        self._closed = True
        for ticket in list(self._tickets):
            self._fail(ticket, NotReadyError("the server is stopping", remedy="try another one"), "stopping")
        self._wake.set()
        await self._loop
        self._thread.shutdown()

    async def _run(self) -> None:
        while not self._closed:
            await self._wake.wait()
            items = self._gather()
            if items:
                await self._run_batch(items)
            else:
                self._wake.clear()

    def _gather(self) -> list[_Item]:
        """The next batch: one item of each request in turn, until it is full or nothing waits."""
        items: list[_Item] = []
        while self._tickets and len(items) < self.batch_sizes[-1]:
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
            images, seconds = await asyncio.get_running_loop().run_in_executor(self._thread, self._call, items)
        except Exception as error:
            if len(items) == 1:
                self._fail_item(items[0], error)
                return
            logger.warning("a batch of %d images failed (%s); running them one by one", len(items), error)
            for item in items:
                if not item[0].done.done():
                    await self._run_batch([item])
            return
        self._metrics.batch.observe(len(items))
        self._image_s += 0.2 * (seconds / len(items) - self._image_s)
        for ticket in {ticket for ticket, _ in items}:
            ticket.model_s += seconds
        for (ticket, index), image in zip(items, images, strict=True):
            self._deliver(ticket, index, image)

    def _call(self, items: list[_Item]) -> tuple[np.ndarray, float]:
        """In the engine's thread: images uint8 [len(items), H, W, C], and the seconds they took."""
        start = time.perf_counter()
        seeds = [ticket.seeds[index] for ticket, index in items]
        size = next(size for size in self.batch_sizes if size >= len(items))
        class_ids = np.array([ticket.class_ids[index] for ticket, index in items], dtype=np.int64)
        # What a request may ask for was checked when it came in.
        inputs = draw_inputs(self._engine.spec, seeds, class_ids if self._engine.spec.num_classes else None)
        images = self._engine(*inputs.padded(size))  # up to a prewarmed size
        expected = (size, *image_size(self._engine.spec))
        if images.shape != expected or images.dtype != np.uint8:
            raise EngineFailedError(
                f"engine {self._engine.id} gave {images.dtype} {images.shape} for uint8 {expected}",
                remedy="export the bundle again",
            )
        return images[: len(items)], time.perf_counter() - start

    def _enqueue(self, ticket: _Ticket) -> None:
        self._tickets.append(ticket)
        self._count(len(ticket.seeds))
        self._wake.set()

    def _deliver(self, ticket: _Ticket, index: int, image: np.ndarray) -> None:
        ticket.images[index] = image
        ticket.left -= 1
        if ticket.left == 0 and not ticket.done.done():
            self._metrics.images.inc(len(ticket.seeds))
            ticket.done.set_result(None)

    def _fail_item(self, item: _Item, error: Exception) -> None:
        ticket, index = item
        logger.error("the engine failed on seed %d", ticket.seeds[index], exc_info=error)
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
        self._metrics.dropped.labels(reason).inc(ticket.left)
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self._count(ticket.next - len(ticket.seeds))

    def _count(self, images: int) -> None:
        self._queued += images
        self._metrics.queue.set(self._queued)

    def _retry_after_s(self) -> int:
        return min(60, max(1, math.ceil(self._queued * self._image_s)))


def prewarm(engine: Engine, max_batch: int, max_batch_s: float) -> tuple[int, ...]:
    """The batch sizes to run, powers of two: as large as pays while one batch holds the engine for at most max_batch_s.

    Each is run before it is admitted, so that no request pays for a first call.
    """
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
