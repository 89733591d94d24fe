"""Speeds side by side: contenders take turns, round by round, so that what else the machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uni_instruct.progress import Progress

# (contender's name, batch) -> seconds of a call, one figure a round.
Seconds = dict[tuple[str, int], list[float]]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Something to be timed. prepare gives the call that makes a batch of so many images; its inputs exist beforehand."""

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
        """Of at least one value."""
        if len(values) == 1:
            return cls(median=values[0], low=values[0], high=values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=median, low=low, high=high)


def turns(contenders: Sequence[Contender], batches: Sequence[int], rounds: int) -> int:
    """How many steps `take_turns` advances its progress by: a first call of each, and one figure of each a round."""
    return len(contenders) * len(batches) * (rounds + 1)


def take_turns(contenders: Sequence[Contender], batches: Sequence[int], rounds: int, least_s: float, bar: Progress) -> Seconds:
    """Seconds of a call of each contender at each batch, `rounds` figures of calls that take least_s together.

    Those of one batch follow each other, forwards and backwards in turn: none has always the same one before it, whose
    threads or caches could disturb it. What a contender raises is not caught.
    """
    calls = [(one.name, batch, one.prepare(batch)) for batch in batches for one in contenders]
    for name, batch, call in calls:  # compiles, allocates, reads weights: no figure
        call()
        bar.advance(1, f"{name}, batch {batch}")
    found: Seconds = {(name, batch): [] for name, batch, _ in calls}
    for number in range(rounds):
        for name, batch, call in calls[:: -1 if number % 2 else 1]:
            found[name, batch].append(seconds_of(call, least_s))
            bar.advance(1, f"{name}, batch {batch}")
    return found


def seconds_of(call: Callable[[], object], least_s: float) -> float:
    """Median over calls that take least_s together, after one that finds the caches full of others' data.

    A call that takes as long by itself is counted at once: caches are a small part of it.
    """
    times = [_timed(call)]
    if times[0] < least_s:
        times = []
    while sum(times) < least_s:
        times.append(_timed(call))
    return statistics.median(times)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median over the rounds of the ratio within one round: what slowed a round down slowed both."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-9)
