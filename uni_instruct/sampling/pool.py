"""Workers that each open a job once and then work off its tasks: the seam between what is to be done and who does it.

A pool loses no task: what a dead worker held is given to another. It knows nothing of files; whoever hands out tasks keeps
account of what is done, so that a pool that ends with its machine costs no more than the tasks under way.
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

# How many workers may die over the same task before it is given up: one that fills the memory would kill them all.
MAX_DEATHS = 5


class Task(NamedTuple):
    """The images of a shard: their seeds int64 [N], and their classes int64 [N] or None.

    Where the images exist already the seeds are their indices. expected: the class that each should be taken for, as scores
    need it, in the reference's numbering.
    """

    shard: Shard
    seeds: np.ndarray
    class_ids: np.ndarray | None
    expected: np.ndarray | None = None


class WorkerJob(Protocol[T_co]):
    """What workers do. It is pickled to them, so it holds names and numbers, and opens what it needs where they run."""

    def open(self) -> Callable[[Task], T_co]:
        """What makes the result of a task; called once a worker."""
        ...

    def paths(self) -> list[Path]:
        """Files and folders that it reads, for workers on machines that do not have them."""
        ...

    def moved(self, places: Mapping[Path, Path]) -> "WorkerJob[T_co]":
        """The same job where those paths stand elsewhere."""
        ...


class Pool(Protocol[T]):
    """Workers on one job."""

    @property
    def idle(self) -> bool:
        """Whether a worker waits for a task."""
        ...

    def submit(self, task: Task) -> None:
        """Gives an idle worker a task."""
        ...

    def wait(self, timeout_s: float) -> list[tuple[Shard, T]]:
        """What has been done since the last call, in any order; returns at once where something has.

        Raises UniInstructError where a task fails, or kills MAX_DEATHS workers.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """Images of seeds, by a bundle's engine: uint8 [N, H, W, C], or latents float32 [N, C, H, W].

    steps: of a teacher's sampler, None for its own. device is as `open_engine` takes it, of each worker by itself.
    """

    bundle: Path
    engine: str
    batch: int
    steps: int | None = None
    device: str | None = None

    def open(self) -> Callable[[Task], np.ndarray]:
        """See WorkerJob."""
        # Other workers want the cores as well.
        bundle = Bundle.open(self.bundle)
        bundle = bundle if self.steps is None else bundle.with_steps(self.steps)
        engine = open_engine(bundle, self.engine, device=self.device, spin=False)
        return lambda task: np.concatenate(list(generate_batches(engine, task.seeds, task.class_ids, self.batch)))

    def paths(self) -> list[Path]:
        """The bundle."""
        return [self.bundle]

    def moved(self, places: Mapping[Path, Path]) -> "ImageJob":
        """See WorkerJob."""
        return replace(self, bundle=places.get(self.bundle, self.bundle))


@dataclass
class Deaths(Generic[T]):
    """Counts the workers that died over each task."""

    counts: dict[Shard, int]

    def count(self, shard: Shard, how: str) -> None:
        """One more. Raises UniInstructError where it is one too many."""
        self.counts[shard] = self.counts.get(shard, 0) + 1
        if self.counts[shard] >= MAX_DEATHS:
            raise UniInstructError(
                f"{MAX_DEATHS} workers died over images {shard.start} to {shard.stop - 1}, the last by {how}",
                remedy="where memory is short give fewer --workers or a smaller --batch; what is done is kept",
            )


def failure(shard: Shard | None, error: BaseException) -> UniInstructError:
    """An error of a worker as the user is told it."""
    if isinstance(error, UniInstructError):
        return error
    what = f"images {shard.start} to {shard.stop - 1} failed" if shard else "a worker cannot start"
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return UniInstructError(f"{what}: {reason}", remedy="the same without --workers or --ray says more; what is done is kept")
