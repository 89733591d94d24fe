"""A pool of Ray actors, on a local Ray or on a cluster."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic

from uni_instruct import __version__
from uni_instruct.sampling.pool import Deaths, Shard, T, Task, WorkerJob, failure
from uni_instruct.system.ray_cluster import LOCAL, check_version, connect, contents, import_ray, unpack_files


class RayPool(Generic[T]):
    """Ray actors that have each opened the job. An actor that dies is replaced, and its task is given to another actor.

    address: a cluster's, in Ray's format (HOST:PORT, ray://HOST:PORT, auto), or LOCAL.
    count: number of actors; by default one for each GPU of the cluster, or one for each CPU if it has no GPU.
    All nodes need this package in this version. The files that the job reads are sent to them.

    Raises MissingExtraError without Ray, RequestError if there is no such cluster or its version differs.
    """

    def __init__(self, job: WorkerJob[T], count: int | None, address: str = LOCAL):
        self._ray = import_ray()
        self._ours = connect(self._ray, address, count)
        resources = self._ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
        self._count = count or gpus or cpus
        # If there are more workers than cores or GPUs, they share them, as a ProcessPool's do.
        options = {"num_cpus": min(1.0, cpus / self._count), "num_gpus": min(1.0, gpus / self._count), "max_restarts": 0}
        self._actor = self._ray.remote(Actor).options(**options)
        files = {path: self._ray.put(contents(path)) for path in job.paths()} if address != LOCAL else {}
        self._job, self._files = self._ray.put(job), files
        self._deaths, self._again = Deaths[T]({}), deque[Task]()
        self._starting: dict[Any, Any] = {}  # reference to the result of an actor's `open` -> the actor
        self._free: list[Any] = []
        self._busy: dict[Any, tuple[Any, Task]] = {}
        self._failed_starts = 0
        for _ in range(self._count):
            self._start()

    def __enter__(self) -> "RayPool[T]":
        return self

    def __exit__(self, *_: object) -> None:
        for actor in [*self._starting.values(), *self._free, *(actor for actor, _ in self._busy.values())]:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()

    @property
    def idle(self) -> bool:
        """See Pool."""
        return bool(self._free)

    def submit(self, task: Task) -> None:
        """See Pool."""
        self._again.append(task)
        self._hand_out()

    def wait(self, timeout_s: float) -> list[tuple[Shard, T]]:
        """See Pool."""
        answers = [*self._starting, *self._busy]
        ready, _ = self._ray.wait(answers, num_returns=1, timeout=timeout_s) if answers else ([], [])
        if ready:  # collect all other results that are available by now
            ready, _ = self._ray.wait(answers, num_returns=len(answers), timeout=0)
        done = list[tuple[Shard, T]]()
        for answer in ready:
            if answer in self._starting:
                self._opened(answer)
            else:
                done.extend(self._finished(answer))
        self._hand_out()
        return done

    def _hand_out(self) -> None:
        while self._again and self._free:
            actor, task = self._free.pop(), self._again.popleft()
            self._busy[actor.make.remote(task)] = actor, task

    def _start(self) -> None:
        actor = self._actor.remote()
        answer = actor.open.remote(self._job, [(str(path), content) for path, content in self._files.items()], __version__)
        self._starting[answer] = actor

    def _opened(self, answer: Any) -> None:
        actor = self._starting.pop(answer)
        try:
            self._ray.get(answer)
            self._free.append(actor)
            self._failed_starts = 0
        except self._ray.exceptions.RayTaskError as error:
            raise failure(None, error.cause) from error
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts > 5 * self._count:
                raise failure(None, error) from error
            self._start()

    def _finished(self, answer: Any) -> list[tuple[Shard, T]]:
        actor, task = self._busy.pop(answer)
        try:
            result: T = self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            raise failure(task.shard, error.cause) from error
        except self._ray.exceptions.RayError as error:  # the actor died, or its node with the result
            self._deaths.count(task.shard, type(error).__name__)
            self._again.appendleft(task)
            self._ray.kill(actor)
            self._start()
            return []
        self._free.append(actor)
        return [(task.shard, result)]


class Actor:
    """The Ray actor: holds the opened job."""

    def open(self, job: WorkerJob[Any], files: list[tuple[str, Any]], version: str) -> None:
        """Write the job's files on this node, unless they are there, and open the job.

        version: the caller's version of this package. Raises RequestError if this node's differs.
        """
        check_version(version)
        ray = import_ray()
        places = {Path(path): unpack_files(ray.get(content)) for path, content in files}
        self._make: Callable[[Task], Any] = job.with_paths(places).open()

    def make(self, task: Task) -> Any:
        """The result of a task."""
        return self._make(task)
