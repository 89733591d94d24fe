"""The batch sizes of an engine: which there are, what each takes, and how many of the images that wait make the best batch."""

import math
import time
from collections.abc import Sequence

from uni_instruct.class_mixture import ClassMixture
from uni_instruct.engine import Engine
from uni_instruct.engines.hardware.device import CPU
from uni_instruct.noise import draw_inputs, round_robin_class_ids

# Weight of the newest batch in the running means of time: they follow a change of load within some ten batches.
_MEAN_WEIGHT = 0.2


class BatchSizes:
    """sizes: those that the engine has run before, in rising order. image_s: its time an image, infinite before the first."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes = tuple(sizes)
        self.image_s = math.inf
        self._call_s: dict[int, float] = {}  # of one call, by size

    def size_for(self, images: int) -> int:
        """The smallest that holds so many images."""
        return next(size for size in self.sizes if size >= images)

    def expected_s(self, images: int) -> float:
        """How long a call with so many images is likely to take; infinite before there has been one."""
        size = self.size_for(images)
        return self._call_s.get(size, self.image_s * size)

    def note(self, images: int, seconds: float) -> None:
        """A call with so many images took so long."""
        size = self.size_for(images)
        self._call_s[size] = _mean(self._call_s.get(size, math.inf), seconds)
        self.image_s = _mean(self.image_s, seconds / images)

    def best_size_of(self, waiting: int) -> int:
        """How many of the images that wait go into the next batch.

        All, padded to the next size, or only as many as fill the size below: what makes more images a second by the times of
        earlier calls. Of 9 images on a CPU 8 leave, on a GPU, which makes 16 in the time of 8, all.
        """
        if waiting >= self.sizes[-1]:
            return self.sizes[-1]
        if waiting in self.sizes or not waiting:
            return waiting
        above = self.size_for(waiting)
        below = self.sizes[self.sizes.index(above) - 1]
        above_s, below_s = self._call_s.get(above), self._call_s.get(below)
        if above_s is None or (below_s is not None and waiting * below_s >= below * above_s):
            return waiting
        return below


def prewarm(engine: Engine, max_batch: int, max_batch_s: float) -> tuple[int, ...]:
    """The batch sizes to run, powers of two: as large as pays while one batch holds the engine for at most max_batch_s.

    Each is run before it is admitted, so that no request pays for a first call.
    """
    # A small request behind a large batch waits for all of it, so the bound on a batch's time is a bound on that wait.
    # With powers of two at most half of a call is padding, and few shapes have to be warmed up.
    sizes: list[int] = []
    size = 1
    while size <= max_batch:
        class_ids = round_robin_class_ids(engine.spec, size)
        inputs = draw_inputs(engine.spec, range(size), class_ids)
        engine(*inputs)
        start = time.perf_counter()
        engine(*inputs)
        if sizes and time.perf_counter() - start > max_batch_s:
            break
        sizes.append(size)
        if engine.mixes_classes and class_ids is not None and engine.device != CPU:
            engine(inputs.noise, ClassMixture.of(class_ids))  # torch captures a CUDA graph for mixtures
        size *= 2
    return tuple(sizes)


def _mean(mean: float, newest: float) -> float:
    return newest if math.isinf(mean) else mean + _MEAN_WEIGHT * (newest - mean)
