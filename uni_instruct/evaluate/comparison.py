"""Is A better than B? An interval for the difference of two scores, of these weights and of the recipes behind them.

Images of other seeds move a score a little; training again, with another seed, moves it more. A score of one training tells two
generators apart, not two recipes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from uni_instruct.errors import RequestError

# Retraining moves FID so many times as far as drawing other seeds does (arXiv 2606.20536).
RETRAINING_TO_RESAMPLING = 3.2
LEVEL = 0.95
BETTER, WORSE, INCONCLUSIVE = "better", "worse", "inconclusive"
# Metrics of which more is better, by how their names begin; of all others less is.
_MORE_IS_BETTER = ("IS", "precision", "recall", "class_accuracy")


@dataclass(frozen=True)
class Trained:
    """One training's values of a metric, one for each disjoint set of seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over sets."""
        return fmean(self.values)


@dataclass(frozen=True)
class Difference:
    """A minus B, the interval that holds it with probability LEVEL, and what that says of A; None where it cannot be said."""

    difference: float
    interval: tuple[float, float] | None
    verdict: str
    basis: str


def compare_weights(name: str, a: Sequence[Trained], b: Sequence[Trained]) -> Difference:
    """Of the weights as they are: only seeds vary."""
    difference = fmean(run.mean for run in a) - fmean(run.mean for run in b)
    errors = [_resampling(side) for side in (a, b)]
    if None in errors:
        return Difference(difference, None, INCONCLUSIVE, "one set of seeds has no spread: evaluate with --sets 3")
    return _judged(name, difference, [error for error in errors if error], "other seeds")


def compare_recipes(name: str, a: Sequence[Trained], b: Sequence[Trained]) -> Difference:
    """Of the recipes: trainings vary as well. Where a side has one training, its spread is guessed from that over seeds."""
    difference = fmean(run.mean for run in a) - fmean(run.mean for run in b)
    errors, guessed = [], False
    for side in (a, b):
        if len(side) > 1:
            errors.append(_Error(stdev([run.mean for run in side]) / math.sqrt(len(side)), len(side) - 1))
            continue
        guessed, seeds = True, _resampling(side)
        if seeds is None:
            return Difference(difference, None, INCONCLUSIVE, "one training and one set of seeds: evaluate with --sets 3")
        # Of one training there is one draw, however many sets were scored.
        errors.append(_Error(RETRAINING_TO_RESAMPLING * stdev(side[0].values), seeds.freedom))
    basis = (
        f"retraining, guessed to move scores {RETRAINING_TO_RESAMPLING} times as far as seeds do: give several trainings"
        if guessed
        else "retraining"
    )
    return _judged(name, difference, errors, basis)


@dataclass(frozen=True)
class _Error:
    """Standard error of a mean, and its degrees of freedom."""

    size: float
    freedom: float


def _resampling(side: Sequence[Trained]) -> _Error | None:
    """Of the mean over trainings that are what they are: pooled over them."""
    if any(len(run.values) < 2 for run in side):
        return None
    squares = [stdev(run.values) ** 2 / len(run.values) for run in side]
    return _Error(math.sqrt(sum(squares)) / len(side), sum(len(run.values) - 1 for run in side))


# Welch 1947: the difference of two means with unlike variances is t-distributed with
# (e_a^2 + e_b^2)^2 / (e_a^4 / f_a + e_b^4 / f_b) degrees of freedom.
def _judged(name: str, difference: float, errors: Sequence[_Error], basis: str) -> Difference:
    variance = sum(error.size**2 for error in errors)
    fourth = sum(error.size**4 / error.freedom for error in errors)
    reach = student_quantile((1 + LEVEL) / 2, variance**2 / fourth) * math.sqrt(variance) if fourth else 0.0
    interval = difference - reach, difference + reach
    better_sign = 1 if name.startswith(_MORE_IS_BETTER) else -1
    if interval[0] <= 0 <= interval[1]:
        return Difference(difference, interval, INCONCLUSIVE, basis)
    return Difference(difference, interval, BETTER if difference * better_sign > 0 else WORSE, basis)


def student_quantile(probability: float, freedom: float) -> float:
    """The t with P(T <= t) = probability, 0.5 to 1, of Student's distribution with so many degrees of freedom (any real > 0).

    Raises RequestError outside that range.
    """
    if not 0.5 <= probability < 1 or freedom <= 0:
        raise RequestError(
            f"no quantile {probability} of {freedom} degrees of freedom",
            remedy="give a probability from 0.5 to below 1, and degrees above 0",
        )
    # With t = tan(u) sqrt(f) the density becomes cos(u)^(f - 1) on (-pi/2, pi/2), which is summed up by the midpoint rule.
    edges = np.linspace(0, math.pi / 2, 400_001)
    density = np.cos((edges[:-1] + edges[1:]) / 2) ** (freedom - 1)
    cumulative = np.concatenate([[0.0], np.cumsum(density)])
    angle = float(np.interp(2 * probability - 1, cumulative / cumulative[-1], edges))
    return math.tan(angle) * math.sqrt(freedom)
