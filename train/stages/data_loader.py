"""Batches of a data set in shuffled epochs, prefetched by several threads."""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from uni_instruct.data import Dataset

# Decoding a PNG takes about as long as a GPU needs to train on it. Decoding releases Python's global lock, so threads help.
THREADS = 4
# As many batches ahead as there are threads keeps all threads busy. For large images fewer are held, but at least one.
AHEAD, AHEAD_BYTES = 4, 512 * 2**20
_FLOAT_BYTES = 4

_Read = tuple[np.ndarray, np.ndarray | None]


class DataLoader:
    """Shuffled epochs over a data set. Batch number `step` depends on the seed and on `step` only, also in a resumed run.

    Images are read a few batches ahead and not kept. An image depends only on its position in the run, so it does not matter
    which thread reads it, or when. A read error is raised at the step that needs the batch.
    """

    def __init__(self, dataset: Dataset, batch: int, seed: int):
        self.dataset, self.batch, self.seed = dataset, batch, seed
        self.ahead = max(1, min(AHEAD, AHEAD_BYTES // (_FLOAT_BYTES * batch * math.prod(dataset.image_shape))))
        # Two epochs, because near the end of an epoch some threads already read the next one.
        self._permutation = lru_cache(maxsize=2)(self._shuffled)
        self._pool = ThreadPoolExecutor(THREADS, "data loader")
        self._started: dict[tuple[int, int, int], Future[_Read]] = {}

    def __call__(self, step: int, part: slice, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The slice `part` of batch `step`: images float32 [b, C, H, W] (`Dataset.floats`), class ids int64 [b] or None."""
        # If a phase changes the number of critic updates, the step number jumps. Prefetched batches that are no longer needed
        # are dropped.
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
        """Seeds for drawing latents, one for each position in the run, so that micro-batches and processes do not matter."""
        if not self.dataset.latents:
            return [0] * len(positions)
        states = (np.random.SeedSequence([self.seed, position]).generate_state(1, np.uint64)[0] for position in positions)
        return [int(state) >> 1 for state in states]

    def _shuffled(self, epoch: int) -> np.ndarray:
        """The order of the images in that epoch, int64 [N]."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
