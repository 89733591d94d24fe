"""A pool of Ray actors: the same on a laptop's own Ray and on a cluster."""

import hashlib
import importlib
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Generic

from uni_instruct import __version__
from uni_instruct.engines.threads import usable_cpus
from uni_instruct.errors import MissingExtraError, RequestError, UniInstructError
from uni_instruct.files import cache_folder, folder_made_once, sha256
from uni_instruct.sampling.pool import Deaths, Shard, T, Task, WorkerJob, failure

# The address that means a Ray of our own on this machine.
LOCAL = "local"
_CONNECT_S = 10.0
# Ray gives itself 30 s to start, which a busy machine may exceed once.
_STARTS = 3
_QUIET = {"logging_level": logging.ERROR, "log_to_driver": False}


class RayPool(Generic[T]):
    """Actors that hold the opened job each; one that dies, with its node or alone, is replaced and its task given to another.

    address: of a cluster, as Ray writes it (HOST:PORT, ray://HOST:PORT, auto), or LOCAL. count: actors; by default one a GPU,
    or where the cluster has none one a CPU. Nodes need this package in this version; what the job reads is sent to them.
    Raises MissingExtraError without Ray, RequestError where there is no such cluster or one of another version.
    """

    def __init__(self, job: WorkerJob[T], count: int | None, address: str = LOCAL):
        self._ray = import_ray()
        self._ours = _connect(self._ray, address, count)
        resources = self._ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
        self._count = count or gpus or cpus
        # More workers than cores or GPUs share them, as processes on one machine do.
        options = {"num_cpus": min(1.0, cpus / self._count), "num_gpus": min(1.0, gpus / self._count), "max_restarts": 0}
        self._actor = self._ray.remote(Actor).options(**options)
        files = {path: self._ray.put(_contents(path)) for path in job.paths()} if address != LOCAL else {}
        self._job, self._files = self._ray.put(job), files
        self._deaths, self._again = Deaths[T]({}), deque[Task]()
        self._starting: dict[Any, Any] = {}  # what an actor answers when it has opened the job -> the actor
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
        if ready:  # whatever else has come meanwhile
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
        except self._ray.exceptions.RayError as error:  # the actor died, or its node with what it had made
            self._deaths.count(task.shard, type(error).__name__)
            self._again.appendleft(task)
            self._ray.kill(actor)
            self._start()
            return []
        self._free.append(actor)
        return [(task.shard, result)]


class Actor:
    """What lives in a Ray worker: the opened job."""

    def open(self, job: WorkerJob[Any], files: list[tuple[str, Any]], version: str) -> None:
        """Puts the files in their place, once a node, and opens the job. Raises RequestError for another version of ours."""
        if version != __version__:
            raise RequestError(
                f"a node of the cluster has uni-instruct {__version__}, this machine {version}",
                remedy=f"pip install 'uni-instruct[ray]=={version}' on all nodes",
            )
        ray = import_ray()
        places = {Path(path): _placed(ray.get(content)) for path, content in files}
        self._make: Callable[[Task], Any] = job.moved(places).open()

    def make(self, task: Task) -> Any:
        """The result of a task."""
        return self._make(task)


def import_ray() -> ModuleType:
    """Ray. Raises MissingExtraError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray 2.60 warns otherwise where an actor has no GPU
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise MissingExtraError("ray", extra="ray") from error


def _connect(ray: ModuleType, address: str, count: int | None) -> bool:
    """Connects this process; whether the connection is ours to end. Raises RequestError."""
    if ray.is_initialized():
        return False
    if address == LOCAL:
        _start_local(ray, count or usable_cpus())
        return True
    _check_listens(address)
    try:
        ray.init(address=address, **_QUIET)
    except Exception as error:  # Ray raises RuntimeError, ConnectionError, ValueError, or gRPC's own
        reason = " ".join(str(error).split())
        if "ersion mismatch" in reason:
            raise RequestError(
                f"the Ray cluster at {address} is of another version: {reason[:300]}",
                remedy=f"install the same ray and Python here as there (ray {ray.__version__} is here)",
                param="ray",
            ) from error
        raise _no_cluster(address, reason[:200]) from error
    return True


def _start_local(ray: ModuleType, cpus: int) -> None:
    for left in reversed(range(_STARTS)):
        try:
            ray.init(address="local", include_dashboard=False, num_cpus=cpus, **_QUIET)
            return
        except Exception as error:  # of no class of its own
            ray.shutdown()
            if not left:
                reason = " ".join(str(error).split())[:300]
                raise UniInstructError(f"Ray does not start: {reason}", remedy="use --workers in place of --ray") from error


def _check_listens(address: str) -> None:
    """Raises RequestError where nothing listens: Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        if address != "auto" and not address.startswith("ray://"):
            raise _no_cluster(address, "that is no HOST:PORT")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, reason: str) -> RequestError:
    return RequestError(
        f"there is no Ray cluster at {address}: {reason}",
        remedy="give its HOST:PORT, or --ray alone for this machine; 'ray start --head' starts one",
        param="ray",
    )


def _contents(path: Path) -> tuple[str, dict[str, bytes]]:
    """A name for what stands at a path, by its content, and the files: of a folder by their place in it, of a file under ''."""
    files = {"": path} if path.is_file() else {str(f.relative_to(path)): f for f in sorted(path.rglob("*")) if f.is_file()}
    digest = hashlib.sha256()
    for name, file in files.items():
        digest.update(f"{name}\0{sha256(file)}\n".encode())
    return f"{digest.hexdigest()[:32]}/{path.name}", {name: file.read_bytes() for name, file in files.items()}


def _placed(sent: tuple[str, dict[str, bytes]]) -> Path:
    """Where the files stand on this node, written by the first actor that needs them; the same for all of them."""
    name, files = sent
    place = cache_folder() / "ray" / name
    if not place.exists():
        # Actors of one node come here at the same time, and the first may be reading already when the second is done.
        with folder_made_once(place.parent) as partial:
            for part, content in files.items():
                file = partial / place.name / part if part else partial / place.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    return place
