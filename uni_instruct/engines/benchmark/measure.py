"""Time several contenders side by side. They take turns in rounds, so that other load on the machine slows all alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uni_instruct.system.progress import Progress

# (contender's name, batch size) -> seconds per call, one figure per round.
Seconds = dict[tuple[str, int], list[float]]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to be timed. prepare(batch) returns a call that makes one batch of that size from inputs made in advance."""

    name: str
    prepare: Callable[[int], Callable[[], object]]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one or more values."""
        if len(values) == 1:
            return cls(median=values[0], low=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)


def turns(contenders: Sequence[Contender], batches: Sequence[int], rounds: int) -> int:
    """How many steps the bar of `measure_interleaved` has: per contender and batch size, a first call and one per round."""
    return len(contenders) * len(batches) * (rounds + 1)


def measure_interleaved(
    contenders: Sequence[Contender], batches: Sequence[int], rounds: int, min_s: float, bar: Progress
) -> Seconds:
    """Measure the seconds per call of each contender at each batch size: `rounds` figures, each over calls of min_s in total.

    The contenders of one batch size follow each other. Every other round runs in reverse order, so that no contender always
    follows the same one, whose threads or caches could slow it. A contender's exceptions are not caught.
    """
    calls = [(one.name, batch, one.prepare(batch)) for batch in batches for one in contenders]
    for name, batch, call in calls:  # compiles, allocates and reads weights, so it is not timed
        call()
        bar.advance(1, f"{name}, batch {batch}")
    found: Seconds = {(name, batch): [] for name, batch, _ in calls}
    for number in range(rounds):
        for name, batch, call in calls[:: -1 if number % 2 else 1]:
            found[name, batch].append(median_seconds(call, min_s))
            bar.advance(1, f"{name}, batch {batch}")
    return found


def median_seconds(call: Callable[[], object], min_s: float) -> float:
    """Median seconds of calls that take min_s in total. A first call, which finds other data in the caches, is not counted.

    If the first call alone takes min_s, it is the result: caches then matter little.
    """
    times = [_timed(call)]
    if times[0] < min_s:
        times = []
    while sum(times) < min_s:
        times.append(_timed(call))
    return statistics.median(times)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over the rounds of the ratio within each round. Load that slows a round slows both, and cancels in the ratio."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-9)  # never 0, as speeds divide by it
