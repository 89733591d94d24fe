"""Batches of a data set in shuffled epochs, read ahead by several threads."""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from uni_instruct.data import Dataset

# Decoding a PNG takes about as long as a GPU takes to train on it, and leaves the interpreter to other threads meanwhile.
THREADS = 4
# As many batches as threads keep all of them busy; of large images fewer are held, but always the next one.
AHEAD, AHEAD_BYTES = 4, 512 * 2**20
_FLOAT_BYTES = 4

_Read = tuple[np.ndarray, np.ndarray | None]


class DataLoader:
    """Shuffled epochs over a data set; batch number `step` is the same however training got there.

    Images are read when they are due, a few batches ahead; none are kept. What is read depends on its place in the run alone,
    so it does not matter which thread reads it, or when. An error of reading is raised at the step that the batch is for.
    """

    def __init__(self, dataset: Dataset, batch: int, seed: int):
        self.dataset, self.batch, self.seed = dataset, batch, seed
        self.ahead = max(1, min(AHEAD, AHEAD_BYTES // (_FLOAT_BYTES * batch * math.prod(dataset.image_shape))))
        # Two epochs: around the end of one, some threads read it while others read the next.
        self._permutation = lru_cache(maxsize=2)(self._shuffled)
        self._pool = ThreadPoolExecutor(THREADS, "data loader")
        self._started: dict[tuple[int, int, int], Future[_Read]] = {}

    def __call__(self, step: int, part: slice, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """That part of the batch: images float32 [B, C, H, W] (`Dataset.floats`), class ids int64 [B] (None without labels)."""
        # Where a phase changes the number of critic updates, steps jump: what lies outside the window is dropped.
        window = range(step, step + self.ahead + 1)
        self._drop_outside(window)
        futures = [self._start_reading(at, part) for at in window]
        del self._started[step, part.start, part.stop]
        values, class_ids = futures[0].result()
        images = torch.from_numpy(values).to(device).permute(0, 3, 1, 2)
        return images, None if class_ids is None else torch.from_numpy(class_ids).to(device)

    def _drop_outside(self, window: range) -> None:
        for key in [key for key in self._started if key[0] not in window]:
            self._started.pop(key).cancel()

    def _start_reading(self, step: int, part: slice) -> "Future[_Read]":
        key = step, part.start, part.stop
        if key not in self._started:
            self._started[key] = self._pool.submit(self._read, step, part)
        return self._started[key]

    def _read(self, step: int, part: slice) -> _Read:
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

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The order of the images in that epoch, int64 [N]."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
