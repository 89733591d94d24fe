"""Sources of a task's images: a bundle's engine, or a data set. Both can be pickled and sent to workers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.engine import open_engine
from uni_instruct.generate import generate_batches
from uni_instruct.sampling.pool import Task

# A function that yields a task's images in batches uint8 [B, H, W, C].
ReadTask = Callable[[Task], Iterator[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class BundleImages:
    """Images that a bundle's engine makes from seeds. steps: of a teacher's sampler, 1 for a one-step generator.

    device: as for `open_engine`, which each worker calls itself.
    """

    bundle: Path
    engine: str
    batch: int
    steps: int
    device: str | None = None

    def open(self, *, alone: bool) -> ReadTask:
        """Open the engine. alone: whether this is the only process at work, so that its threads may spin while they wait."""
        engine = open_engine(Bundle.open(self.bundle).with_steps(self.steps), self.engine, device=self.device, spin=alone)
        return lambda task: generate_batches(engine, task.seeds, task.class_ids, self.batch)

    def paths(self) -> list[Path]:
        """The bundle's folder."""
        return [self.bundle]

    def with_paths(self, places: Mapping[Path, Path]) -> "BundleImages":
        """The same source with the bundle's path replaced."""
        return replace(self, bundle=places.get(self.bundle, self.bundle))


@dataclass(frozen=True, kw_only=True)
class DatasetImages:
    """Images of a data set by their indices. source: as for `open_dataset`; workers must be able to read the same path.

    opened: the opened data set, for use in this process.
    """

    source: str
    batch: int
    opened: Dataset | None = None

    def open(self, *, alone: bool) -> ReadTask:
        """Open the data set, unless `opened` has it."""
        dataset = self.opened or open_dataset(self.source)
        return lambda task: (
            dataset.images(task.seeds[start : start + self.batch]) for start in range(0, len(task.seeds), self.batch)
        )

    def paths(self) -> list[Path]:
        """No paths: a data set is too large to be sent to workers."""
        return []

    def with_paths(self, places: Mapping[Path, Path]) -> "DatasetImages":
        """Itself, since `paths` is empty."""
        return self
