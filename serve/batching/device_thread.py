"""The one thread that runs engines on a device, and the turns that batchers take on it."""

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from uni_instruct.engines.hardware.device import CPU

# What takes no longer runs on the event loop: to wake a thread and to be woken by it takes as long as a small network.
QUICK_S = 0.001


class EngineCall(NamedTuple):
    """What runs in the thread, and gives back what is to be called on the event loop afterwards. It must not raise.

    expected_s: how long it is likely to take.
    """

    run: Callable[[], Callable[[], None]]
    expected_s: float = math.inf


# Called when the turn has come, on the event loop or in the thread, under `DeviceThread.lock`: a job, or None where nothing
# waits any more.
Turn = Callable[[], EngineCall | None]


class DeviceThread:
    """Runs one job at a time; batchers take turns, in the order in which they ask. To be used from one event loop.

    No future and no task a batch: the loop hears of it by one callback. The thread takes the next job by itself: the loop may
    be answering requests for milliseconds before it could hand one over. Jobs of up to quick_s seconds run on the loop.
    """

    def __init__(self, quick_s: float = 0.0) -> None:
        self.lock = threading.RLock()  # to be held by whoever changes what a turn looks at
        self._quick_s = quick_s
        self._jobs: SimpleQueue[EngineCall | None] = SimpleQueue()
        self._turns: deque[Turn] = deque()
        self._busy = False
        self._loop: asyncio.AbstractEventLoop | None = None
        # One thread: a second call at the same time would only share the same cores. A daemon, as it waits for ever.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether jobs are run."""
        return self._loop is None or self._thread.is_alive()

    def ask(self, turn: Turn) -> None:
        """A turn, once those who have asked before have had theirs. To be called on the event loop, or within a turn."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()
        with self.lock:
            self._turns.append(turn)
            waits_for_nobody = not self._busy and len(self._turns) == 1
        if waits_for_nobody:
            # Not at once: what the event loop has read in the same round goes into the same batch.
            self._loop.call_soon(self._start)

    def close(self) -> None:
        """Ends the thread, after the job that runs."""
        if self._loop is not None:
            self._jobs.put(None)
            self._thread.join()

    def _start(self) -> None:
        """On the event loop, where the thread may be idle: runs what is quick, hands over what is not."""
        while not self._busy and (job := self._next()) is not None:
            if job.expected_s <= self._quick_s:
                self._run_here(job)
            else:
                self._busy = True
                self._jobs.put(job)

    def _run_here(self, job: EngineCall) -> None:
        assert self._loop is not None
        try:
            job.run()()
        except BaseException:
            self._loop.call_soon(self._start)  # or those who wait for a turn would wait for ever
            raise

    def _next(self) -> EngineCall | None:
        # A batch is gathered when its turn comes, not before: while one model runs, the batches of the others go on filling.
        with self.lock:
            while self._turns:
                job = self._turns.popleft()()
                if job is not None:
                    return job
            self._busy = False
            return None

    def _work(self) -> None:
        assert self._loop is not None
        job = self._jobs.get()
        while job is not None:
            deliver = job.run()
            job = self._next()  # before the loop hears: what it is asked for next may be quick, and the thread idle
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for it any more
                self._loop.call_soon_threadsafe(deliver)
            if job is None:
                job = self._jobs.get()


class DeviceThreads:
    """A DeviceThread for each device, made when first asked for."""

    def __init__(self) -> None:
        self._threads: dict[str, DeviceThread] = {}

    def of(self, device: str) -> DeviceThread:
        """The thread of that device, such as 'cpu' or 'cuda:0'."""
        if device not in self._threads:
            # Only on the CPU: what was captured on a GPU belongs to the thread that has done it.
            self._threads[device] = DeviceThread(QUICK_S if device == CPU else 0.0)
        return self._threads[device]

    def close(self) -> None:
        """Ends the threads, after the jobs that run."""
        for thread in self._threads.values():
            thread.close()
