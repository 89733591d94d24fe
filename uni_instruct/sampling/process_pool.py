"""A pool of processes on this machine."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Generic

from uni_instruct.engines.hardware.threads import usable_cpus
from uni_instruct.errors import UniInstructError
from uni_instruct.sampling.pool import Deaths, Shard, T, Task, WorkerJob, failure

# For each worker of the pool, the number of deaths in a row that may happen before any worker has opened the job.
MAX_FAILED_STARTS = 5
_GPUS = Path("/proc/driver/nvidia/gpus")


class ProcessPool(Generic[T]):
    """`count` processes, which share the CPU cores equally. If there are GPUs, they are assigned in turn, one to a process.

    A process that dies is replaced. All processes end when this one does, even if it is killed.
    """

    def __init__(self, job: WorkerJob[T], count: int):
        self._job, self._deaths, self._failed_starts = job, Deaths[T]({}), 0
        self._again: deque[Task] = deque()
        # Spawned, not forked: the fork of a process with threads (torch, ONNX Runtime) can hang.
        self._context = multiprocessing.get_context("spawn")
        self._environments = [_environment(number, count) for number in range(count)]
        with _quiet_interrupts():
            self._workers = [self._started(environment) for environment in self._environments]

    def __enter__(self) -> "ProcessPool[T]":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    @property
    def idle(self) -> bool:
        """See Pool."""
        return any(worker.is_idle for worker in self._workers)

    def submit(self, task: Task) -> None:
        """See Pool."""
        self._again.append(task)
        self._hand_out()

    def wait(self, timeout_s: float) -> list[tuple[Shard, T]]:
        """See Pool."""
        done = list[tuple[Shard, T]]()
        ready = wait([worker.pipe for worker in self._workers], timeout_s)
        for worker in [worker for worker in self._workers if worker.pipe in ready]:
            try:
                answer = worker.pipe.recv()
            except (EOFError, OSError):
                self._replace(worker)
                continue
            task, worker.task = worker.task, None
            if isinstance(answer, UniInstructError):
                raise answer
            if task is None:
                worker.started, self._failed_starts = True, 0
            else:
                done.append((task.shard, answer))
        self._hand_out()
        return done

    def _hand_out(self) -> None:
        for worker in self._workers:
            if self._again and worker.is_idle:
                worker.task = self._again.popleft()
                with suppress(OSError):  # the worker has just died; `wait` detects that and submits the task again
                    worker.pipe.send(worker.task)

    def _replace(self, worker: "_Worker") -> None:
        how = worker.end()
        if worker.task is not None:
            self._deaths.count(worker.task.shard, how)
            self._again.appendleft(worker.task)
        elif not worker.started:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS * len(self._workers):
                raise UniInstructError(f"workers die while they start, the last from {how}", remedy="give fewer --workers")
        place = self._workers.index(worker)
        with _quiet_interrupts():
            self._workers[place] = self._started(self._environments[place])

    def _started(self, environment: dict[str, str]) -> "_Worker":
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._job, environment), daemon=True)
        process.start()
        theirs.close()  # with this copy open, the pipe would not report the end of the process
        return _Worker(process, ours)


class _Worker:
    def __init__(self, process: SpawnProcess, pipe: Connection):
        self.process, self.pipe = process, pipe
        self.task: Task | None = None
        self.started = False

    @property
    def is_idle(self) -> bool:
        return self.started and self.task is None

    def end(self) -> str:
        """End the process, by force if need be; return how it ended, for messages."""
        self.pipe.close()  # an idle worker ends when its pipe closes; a busy one is killed
        self.process.join(0.2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def _work(pipe: Connection, job: WorkerJob[T], environment: dict[str, str]) -> None:
    """The main function of a worker: open the job, report that, then answer each task until the pipe is closed."""
    os.environ.update(environment)  # must be before torch or a runtime is loaded
    shard: Shard | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            make = job.open()
            pipe.send(None)
            while True:
                task = pipe.recv()
                shard = task.shard
                pipe.send(make(task))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            pipe.send(failure(shard, error))


def _environment(number: int, count: int) -> dict[str, str]:
    changes = {"OMP_NUM_THREADS": str(max(1, usable_cpus() // count))}
    if gpus := _visible_gpus():
        changes["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return changes


def _visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number in range(len(list(_GPUS.iterdir())))] if _GPUS.is_dir() else []


@contextmanager
def _quiet_interrupts() -> Iterator[None]:
    """Processes started within the block ignore Ctrl-C. A terminal sends it to all processes; only this one should react."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
