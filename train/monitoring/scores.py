"""Names of the score that the best weights are chosen by; apart from the loop, because a run's status needs no torch."""

from collections.abc import Mapping
from typing import NamedTuple


class SelectionMetric(NamedTuple):
    """What a recipe's metric asks the evaluator for, and how the answer's name begins."""

    asked: str
    printed: tuple[str, str]


# torch-fidelity compares all images of the reference with each other for precision and recall, at every call: minutes for more.
MAX_REFERENCE_FOR_PR = 10_000
SELECTION_METRICS = {"FD": SelectionMetric("fd", ("FD(", "FID")), "KD": SelectionMetric("kd", ("KD(", "KID"))}


def metric_value(scores: Mapping[str, float], metric: str) -> float:
    """The score that is minimised, under the name that its extractor gives it: FD(<extractor>) or FID, KD(...) or KID."""
    return next(value for name, value in scores.items() if name.startswith(SELECTION_METRICS[metric].printed))
