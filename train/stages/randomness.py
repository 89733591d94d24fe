"""Randomness that depends on seed, stage and step alone, so that a resumed run is the run that was not interrupted."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from uni_instruct.data import Dataset


def step_generator(seed: int, stage: str, step: int) -> torch.Generator:
    """A CPU generator for one training step. Drawing on the CPU gives the same run on every device."""
    digest = hashlib.sha256(f"{seed}/{stage}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


Built = TypeVar("Built")


class DataLoader:
    """Shuffled epochs over a data set; batch number `step` is the same however training got there.

    Images are read when they are due, one batch ahead, by a thread of its own; none are kept.
    """

    def __init__(self, dataset: Dataset, batch: int, seed: int):
        self.dataset, self.batch, self.seed = dataset, batch, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        self._reader = ThreadPoolExecutor(1, "batches")  # alone in touching the data set
        self._ahead: dict[tuple[int, int, int], Future[_Read]] = {}

    def __call__(self, step: int, part: slice, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """That part of the batch: images float32 [B, C, H, W] (`Dataset.floats`), class ids int64 [B] (None without labels)."""
        future = self._ahead.pop((step, part.start, part.stop), None) or self._start_reading(step, part)
        self._ahead = {key: value for key, value in self._ahead.items() if key[0] >= step}
        self._ahead[step + 1, part.start, part.stop] = self._start_reading(step + 1, part)
        values, class_ids = future.result()
        images = torch.from_numpy(values).to(device).permute(0, 3, 1, 2)
        return images, None if class_ids is None else torch.from_numpy(class_ids).to(device)

    def _start_reading(self, step: int, part: slice) -> "Future[_Read]":
        return self._reader.submit(self._read, step, part)

    def _read(self, step: int, part: slice) -> "_Read":
        positions = range(step * self.batch + part.start, step * self.batch + part.stop)
        index = np.array([self._permutation(p // len(self.dataset))[p % len(self.dataset)] for p in positions])
        labels = self.dataset.labels
        return self.dataset.floats(index, self._seeds(positions)), None if labels is None else labels[index]

    def _seeds(self, positions: range) -> list[int]:
        """What latents are drawn by: of each place in the run, so that neither micro-batches nor processes change them."""
        if not self.dataset.latents:
            return [0] * len(positions)
        states = (np.random.SeedSequence([self.seed, position]).generate_state(1, np.uint64)[0] for position in positions)
        return [int(state) >> 1 for state in states]

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
        return self._order


_Read = tuple[np.ndarray, np.ndarray | None]


def initial_weights(build: Callable[[], Built], seed: int) -> Built:
    """What `build` makes, with weights that depend on the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
