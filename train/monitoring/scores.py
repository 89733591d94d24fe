"""The scores by which the best weights can be chosen. A module of its own, because `train --status` must not import torch."""

from collections.abc import Mapping
from typing import NamedTuple


class SelectionMetric(NamedTuple):
    """A recipe's metric: its name for the evaluator (`asked`), and how the names of the resulting score may begin."""

    asked: str
    printed: tuple[str, str]


# For precision and recall, torch-fidelity compares all pairs of reference images at every call. With more it takes minutes.
MAX_REFERENCE_FOR_PR = 10_000
SELECTION_METRICS = {"FD": SelectionMetric("fd", ("FD(", "FID")), "KD": SelectionMetric("kd", ("KD(", "KID"))}


def affords_pr(reference_images: int) -> bool:
    """Whether precision and recall are measured during training and in the report, for a reference of that many images."""
    return reference_images <= MAX_REFERENCE_FOR_PR


def metric_value(scores: Mapping[str, float], metric: str) -> float:
    """The score that is minimised. Its name depends on the extractor: FD(<extractor>) or FID, KD(<extractor>) or KID."""
    return next(value for name, value in scores.items() if name.startswith(SELECTION_METRICS[metric].printed))
