"""Where the images of a task come from: a bundle's engine, or a data set. Both can be pickled to a worker."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.engine import open_engine
from uni_instruct.generate import generate_batches
from uni_instruct.sampling.pool import Task

# Gives a task's images in batches, uint8 [B, H, W, C].
ReadTask = Callable[[Task], Iterator[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class BundleImages:
    """The images that an engine of a bundle makes of seeds, in so many steps of the sampler.

    device as `open_engine` takes it, of each worker by itself.
    """

    bundle: Path
    engine: str
    batch: int
    steps: int
    device: str | None = None

    def open(self, *, alone: bool) -> ReadTask:
        """alone: whether this process has the machine to itself."""
        engine = open_engine(Bundle.open(self.bundle).with_steps(self.steps), self.engine, device=self.device, spin=alone)
        return lambda task: generate_batches(engine, task.seeds, task.class_ids, self.batch)

    def paths(self) -> list[Path]:
        """The bundle."""
        return [self.bundle]

    def moved(self, places: Mapping[Path, Path]) -> "BundleImages":
        """The same where the bundle stands elsewhere."""
        return replace(self, bundle=places.get(self.bundle, self.bundle))


@dataclass(frozen=True, kw_only=True)
class DatasetImages:
    """The images of a data set, by their indices; source as `open_dataset` takes it. Workers read it where it is."""

    source: str
    batch: int
    opened: Dataset | None = None

    def open(self, *, alone: bool) -> ReadTask:
        """The data set is opened here unless it is at hand."""
        dataset = self.opened or open_dataset(self.source)
        return lambda task: (
            dataset.images(task.seeds[start : start + self.batch]) for start in range(0, len(task.seeds), self.batch)
        )

    def paths(self) -> list[Path]:
        """Nothing: a data set is too large to be sent about."""
        return []

    def moved(self, places: Mapping[Path, Path]) -> "DatasetImages":
        """The same."""
        return self
