"""The batch sizes of an engine: which ones are used, how long each takes, and how many waiting images to run at once."""

import math
import time
from collections.abc import Sequence

from uni_instruct.class_mixture import ClassMixture
from uni_instruct.engine import Engine
from uni_instruct.engines.hardware.device import CPU
from uni_instruct.noise import draw_inputs, round_robin_class_ids

# Weight of the newest call in the moving averages of times. They adapt to a change of load within about ten calls.
_MEAN_WEIGHT = 0.2


class BatchSizes:
    """Batch sizes with a moving average of their times.

    sizes: those that the engine has already run, in rising order. image_s: seconds per image, infinite before the first call.
    """

    def __init__(self, sizes: Sequence[int]):
        self.sizes = tuple(sizes)
        self.image_s = math.inf
        self._call_s: dict[int, float] = {}  # batch size -> seconds of one call

    def size_for(self, images: int) -> int:
        """Return the smallest batch size for at least that many images."""
        return next(size for size in self.sizes if size >= images)

    def expected_s(self, images: int) -> float:
        """Return how long a call with that many images probably takes, in seconds; infinite before the first call."""
        size = self.size_for(images)
        return self._call_s.get(size, self.image_s * size)

    def note(self, images: int, seconds: float) -> None:
        """Record that a call with that many images took `seconds`."""
        size = self.size_for(images)
        self._call_s[size] = _mean(self._call_s.get(size, math.inf), seconds)
        self.image_s = _mean(self.image_s, seconds / images)

    def best_size_of(self, waiting: int) -> int:
        """Return how many of the waiting images to put into the next batch.

        Either all of them, padded to the next size, or only as many as fill the size below: whichever makes more images a
        second by the times of earlier calls. A size without a time is tried. For example, with 9 waiting images a CPU runs 8,
        and a GPU that makes 16 in the time of 8 runs all 9.
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
    """Run the engine with 1, 2, 4, ... images, and return the batch sizes to use.

    They are at most max_batch, and one call takes at most max_batch_s seconds; size 1 is used in any case. Each size is run
    before it is used, so that no request has to wait for a runtime's slow first call.
    """
    # A small request behind a large batch waits for all of that batch. The limit on a batch's time therefore limits the wait.
    # With powers of two less than half of a call is padding, and only a few shapes have to be warmed up.
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
            engine(inputs.noise, ClassMixture.of(class_ids))  # torch captures a separate CUDA graph for class mixtures
        size *= 2
    return tuple(sizes)


def _mean(mean: float, newest: float) -> float:
    return newest if math.isinf(mean) else mean + _MEAN_WEIGHT * (newest - mean)
