"""Interfaces of worker pools: each worker opens a job once, then processes tasks. They separate the work from where it runs.

A pool loses no task: if a worker dies, its task is given to another worker. A pool handles no output files. Its caller records
which tasks are done, so if the pool's machine fails, only the tasks in progress are lost.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.errors import UniInstructError
from uni_instruct.generate import generate_batches
from uni_instruct.sampling.shards import Shard

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")

# A task is given up after it has killed this many workers. One that exhausts the memory would kill all of them.
MAX_DEATHS = 5


class Task(NamedTuple):
    """The images of a shard.

    seeds: int64 [N]; for images that exist already, their indices. class_ids: int64 [N] or None.
    expected: the true class of each image in the reference's numbering, for scores that need it.
    """

    shard: Shard
    seeds: np.ndarray
    class_ids: np.ndarray | None
    expected: np.ndarray | None = None


class WorkerJob(Protocol[T_co]):
    """The work of all workers. It is pickled, so it holds names and numbers only; `open` loads the rest in each worker."""

    def open(self) -> Callable[[Task], T_co]:
        """Load what the work needs; return the function from a task to its result. Called once in each worker."""
        ...

    def paths(self) -> list[Path]:
        """Files and folders that the job reads. They are sent to machines that may not have them."""
        ...

    def with_paths(self, places: Mapping[Path, Path]) -> "WorkerJob[T_co]":
        """The job with its paths replaced by their new places."""
        ...


class Pool(Protocol[T]):
    """A pool of workers for one job."""

    @property
    def idle(self) -> bool:
        """Whether a worker is waiting for a task."""
        ...

    def submit(self, task: Task) -> None:
        """Give the task to an idle worker."""
        ...

    def wait(self, timeout_s: float) -> list[tuple[Shard, T]]:
        """The results since the last call, in any order. Waits for at most timeout_s, and only if there is no result yet.

        Raises UniInstructError if a task fails or has killed MAX_DEATHS workers.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """Make the images of seeds with a bundle's engine: uint8 [N, H, W, C], or latents float32 [N, C, H, W].

    steps: of a teacher's sampler; None for the bundle's number. device: as for `open_engine`, which each worker calls itself.
    """

    bundle: Path
    engine: str
    batch: int
    steps: int | None = None
    device: str | None = None

    def open(self) -> Callable[[Task], np.ndarray]:
        """See WorkerJob."""
        # spin=False below, because several workers share the cores.
        bundle = Bundle.open(self.bundle)
        bundle = bundle if self.steps is None else bundle.with_steps(self.steps)
        engine = open_engine(bundle, self.engine, device=self.device, spin=False)
        return lambda task: np.concatenate(list(generate_batches(engine, task.seeds, task.class_ids, self.batch)))

    def paths(self) -> list[Path]:
        """The bundle's folder."""
        return [self.bundle]

    def with_paths(self, places: Mapping[Path, Path]) -> "ImageJob":
        """See WorkerJob."""
        return replace(self, bundle=places.get(self.bundle, self.bundle))


@dataclass
class Deaths(Generic[T]):
    """Counts the workers that died over each task."""

    counts: dict[Shard, int]

    def count(self, shard: Shard, how: str) -> None:
        """Count one more. Raises UniInstructError if the task has killed MAX_DEATHS workers."""
        self.counts[shard] = self.counts.get(shard, 0) + 1
        if self.counts[shard] >= MAX_DEATHS:
            raise UniInstructError(
                f"{MAX_DEATHS} workers died while making images {shard.start} to {shard.stop - 1}, the last from {how}",
                remedy="if memory is short, give fewer --workers or a smaller --batch; finished images are kept",
            )


def failure(shard: Shard | None, error: BaseException) -> UniInstructError:
    """A worker's error for the user: as it is if it is the project's own, otherwise wrapped with what was being done."""
    if isinstance(error, UniInstructError):
        return error
    what = f"images {shard.start} to {shard.stop - 1} failed" if shard else "a worker cannot start"
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return UniInstructError(
        f"{what}: {reason}", remedy="run it without --workers or --ray for the full error; finished images are kept"
    )
