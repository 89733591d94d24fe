"""Is A better than B? A confidence interval for the difference of two scores, for two generators or for their recipes.

Other seeds of the images change a score a little. Training again with another seed changes it more. So a score of one training
each can tell two generators apart, but not two recipes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from uni_instruct.errors import RequestError

# The standard deviation of FID over retrainings, divided by that over other seeds of the images (arXiv 2606.20536).
RETRAINING_TO_RESAMPLING = 3.2
LEVEL = 0.95
BETTER, WORSE, INCONCLUSIVE = "better", "worse", "inconclusive"
# How the names of metrics begin for which higher is better. For all others lower is better.
_MORE_IS_BETTER = ("IS", "precision", "recall", "class_accuracy")


@dataclass(frozen=True)
class TrainingScores:
    """The values of a metric for one training, one for each disjoint set of seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the sets."""
        return fmean(self.values)


@dataclass(frozen=True)
class Difference:
    """A minus B, and what it means for A.

    interval: the confidence interval of level LEVEL; None if it cannot be computed. verdict: BETTER, WORSE or INCONCLUSIVE.
    basis: what the interval accounts for, in words.
    """

    difference: float
    interval: tuple[float, float] | None
    verdict: str
    basis: str


def compare_weights(name: str, a: Sequence[TrainingScores], b: Sequence[TrainingScores]) -> Difference:
    """Compare the weights as they are: only the seeds of the images vary."""
    difference = fmean(run.mean for run in a) - fmean(run.mean for run in b)
    errors = [_resampling(side) for side in (a, b)]
    if None in errors:
        return Difference(difference, None, INCONCLUSIVE, "one set of seeds has no spread: evaluate with --sets 3")
    return _judged(name, difference, [error for error in errors if error], "other seeds")


def compare_recipes(name: str, a: Sequence[TrainingScores], b: Sequence[TrainingScores]) -> Difference:
    """Compare the recipes: trainings vary too. The spread of a side with one training is estimated from that over seeds."""
    difference = fmean(run.mean for run in a) - fmean(run.mean for run in b)
    errors, guessed = [], False
    for side in (a, b):
        if len(side) > 1:
            errors.append(_Error(stdev([run.mean for run in side]) / math.sqrt(len(side)), len(side) - 1))
            continue
        guessed, seeds = True, _resampling(side)
        if seeds is None:
            return Difference(difference, None, INCONCLUSIVE, "one training and one set of seeds: evaluate with --sets 3")
        # One training is one draw, so more sets of seeds do not reduce the error.
        errors.append(_Error(RETRAINING_TO_RESAMPLING * stdev(side[0].values), seeds.freedom))
    basis = (
        f"retraining, estimated to change scores {RETRAINING_TO_RESAMPLING} times as much as other seeds do: "
        "give several trainings"
        if guessed
        else "retraining"
    )
    return _judged(name, difference, errors, basis)


@dataclass(frozen=True)
class _Error:
    """The standard error of a mean, and its degrees of freedom."""

    size: float
    freedom: float


def _resampling(side: Sequence[TrainingScores]) -> _Error | None:
    """The error from the seeds alone of the mean over these trainings, pooled over them; None if one has a single set."""
    if any(len(run.values) < 2 for run in side):
        return None
    squares = [stdev(run.values) ** 2 / len(run.values) for run in side]
    return _Error(math.sqrt(sum(squares)) / len(side), sum(len(run.values) - 1 for run in side))


# Welch 1947: the difference of two means with unequal variances is approximately t-distributed with
# (e_a^2 + e_b^2)^2 / (e_a^4 / f_a + e_b^4 / f_b) degrees of freedom, for standard errors e and degrees of freedom f.
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
    """The quantile t of Student's distribution, with P(T <= t) = probability.

    probability: from 0.5 to below 1. freedom: degrees of freedom, any real number > 0. Raises RequestError for other values.
    """
    if not 0.5 <= probability < 1 or freedom <= 0:
        raise RequestError(
            f"no quantile {probability} of {freedom} degrees of freedom",
            remedy="give a probability from 0.5 to below 1, and degrees above 0",
        )
    # Substituting t = tan(u) sqrt(f), the density is proportional to cos(u)^(f - 1) on (-pi/2, pi/2). It is integrated by the
    # midpoint rule.
    edges = np.linspace(0, math.pi / 2, 400_001)
    density = np.cos((edges[:-1] + edges[1:]) / 2) ** (freedom - 1)
    cumulative = np.concatenate([[0.0], np.cumsum(density)])
    angle = float(np.interp(2 * probability - 1, cumulative / cumulative[-1], edges))
    return math.tan(angle) * math.sqrt(freedom)
