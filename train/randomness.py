"""Randomness that depends on seed, stage and step alone, so that a resumed run is the run that was not interrupted."""

import hashlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from uni_instruct.data import Dataset


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """A CPU generator for one training step. Drawing on the CPU gives the same run on every device."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


Module = TypeVar("Module", bound=torch.nn.Module)


class Batches:
    """Shuffled epochs over a data set; batch number `step` is the same however training got there."""

    def __init__(self, dataset: Dataset, batch: int, seed: int):
        self.dataset, self.batch, self.seed = dataset, batch, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, step: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images float32 [B, C, H, W] in [-1, 1] and class ids int64 [B] (None without labels)."""
        positions = range(step * self.batch, (step + 1) * self.batch)
        index = np.array([self._permutation(p // len(self.dataset))[p % len(self.dataset)] for p in positions])
        pixels = torch.from_numpy(self.dataset.images(index)).to(device)
        labels = self.dataset.labels
        class_ids = None if labels is None else torch.from_numpy(labels[index]).to(device)
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, class_ids

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        return self._order


def initial_weights(build: Callable[[], Module], seed: int) -> Module:
    """What `build` makes, with weights that depend on the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
