"""The one thread that runs all engines on a device, and the queue of turns in which batchers use it."""

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

from uni_instruct.engines.hardware.device import CPU

# Jobs of up to this many seconds run on the event loop. Waking a thread and being woken by it takes as long as a small network.
QUICK_S = 0.001


class EngineCall(NamedTuple):
    """A job for the thread. `run` must not raise, and returns a callback that is then called on the event loop.

    expected_s: how many seconds it will probably take.
    """

    run: Callable[[], Callable[[], None]]
    expected_s: float = math.inf


# A batcher's callback. It is called when the batcher's turn has come, on the event loop or in the thread, with
# `DeviceThread.lock` held. It returns a job, or None if nothing waits any more.
Turn = Callable[[], EngineCall | None]


class DeviceThread:
    """Runs one job at a time. Batchers take turns, in the order in which they ask. To be used from one event loop.

    A batch needs no future and no task: its result reaches the event loop by one callback. The thread fetches the next job
    itself, because the loop may be busy with requests for milliseconds before it could pass one on. Jobs of up to quick_s
    seconds run on the event loop.
    """

    def __init__(self, quick_s: float = 0.0) -> None:
        self.lock = threading.RLock()  # must be held to change anything that a turn reads, such as a batcher's queue
        self._quick_s = quick_s
        self._jobs: SimpleQueue[EngineCall | None] = SimpleQueue()
        self._turns: deque[Turn] = deque()
        self._busy = False
        self._loop: asyncio.AbstractEventLoop | None = None
        # One thread: a second engine call at the same time would only share the same cores. A daemon, so that the process can
        # exit although this thread waits for jobs.
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether jobs are processed: the thread runs, or has not been needed yet."""
        return self._loop is None or self._thread.is_alive()

    def ask(self, turn: Turn) -> None:
        """Request a turn, after those requested before. Call it on the event loop, or within a turn."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()
        with self.lock:
            self._turns.append(turn)
            is_next = not self._busy and len(self._turns) == 1
        if is_next:
            # In the next iteration of the loop, so that all requests that were read in this one go into the same batch.
            self._loop.call_soon(self._start)

    def close(self) -> None:
        """End the thread, after the running job."""
        if self._loop is not None:
            self._jobs.put(None)
            self._thread.join()

    def _start(self) -> None:
        """On the event loop, while the thread is idle: run quick jobs here, and give the first longer one to the thread."""
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
            self._loop.call_soon(self._start)  # otherwise no later turn would ever come
            raise

    def _next(self) -> EngineCall | None:
        # A turn fills its batch only when it is called, so that while one model runs, the batches of the others go on filling.
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
            job = self._next()  # before the callback, which may ask for a turn and needs to know whether this thread is idle
            with contextlib.suppress(RuntimeError):  # the loop is closed, so no request waits for the result
                self._loop.call_soon_threadsafe(deliver)
            if job is None:
                job = self._jobs.get()


class DeviceThreads:
    """One DeviceThread for each device, created when it is first needed."""

    def __init__(self) -> None:
        self._threads: dict[str, DeviceThread] = {}

    def of(self, device: str) -> DeviceThread:
        """Return the thread of a device, such as 'cpu' or 'cuda:0'."""
        if device not in self._threads:
            # Only the CPU's quick jobs run on the event loop. All of a GPU's jobs stay in the device's thread.
            self._threads[device] = DeviceThread(QUICK_S if device == CPU else 0.0)
        return self._threads[device]

    def close(self) -> None:
        """End all threads, after their running jobs."""
        for thread in self._threads.values():
            thread.close()
