"""Compute scores from features. torch-fidelity computes the metrics that compare single images.

The names of values include the extractor, unless it is InceptionV3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from uni_instruct.errors import RequestError
from uni_instruct.evaluate.extractors import Extractor
from uni_instruct.evaluate.fidelity import fidelity
from uni_instruct.evaluate.summary import KEPT_IMAGES, SPLITS, Summary

if TYPE_CHECKING:
    import torch

# The defaults of torch-fidelity: subsets of KID, and k of precision and recall.
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3
MIN_SAMPLES = NEIGHBOURS + 1  # an image has k neighbours only among k + 1
POOR_ACCURACY = 0.8  # below this accuracy of the classifier, a note warns
# Rows of a distance matrix that are in memory at once, and the most values in them: torch-fidelity holds several copies.
_NEIGHBOUR_BATCH, _NEIGHBOUR_VALUES = 2000, 2**24
PUBLISHED_SAMPLES = 50_000  # the number of images in published FIDs


@dataclass(frozen=True)
class Scores:
    """The values of metrics by their full names, and what they depend on.

    extractor, reference: names. samples: the number of scored images. notes: limitations that a reader should know.
    """

    extractor: str
    samples: int
    reference: str
    values: dict[str, float]
    extractor_sha256: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """The input of a metric: the summary of generated images, and the reference.

    mu, sigma: the reference's statistics. reference: features [K, D] of at most KEPT_IMAGES of its images; None if the
    reference is statistics. has_class_ids: whether the true class of each generated image is known.
    """

    generated: Summary
    mu: np.ndarray
    sigma: np.ndarray
    reference: np.ndarray | None
    has_class_ids: bool


@dataclass(frozen=True)
class Metric:
    """The functions of a metric.

    measure: returns values by full name. missing: returns why the metric cannot be measured, None if it can.
    """

    measure: Callable[[Extractor, Comparison], dict[str, float]]
    missing: Callable[["Available"], str | None]


@dataclass(frozen=True)
class Available:
    """What decides which metrics can be measured. images, reference_images: numbers; the latter is 0 for statistics."""

    extractor: Extractor
    images: int
    reference_images: int
    has_class_ids: bool


def score(extractor: Extractor, comparison: Comparison, metrics: Sequence[str] | None, reference: str) -> Scores:
    """Measure the named metrics (keys of METRICS), or all that apply. reference: its name, for the result.

    Raises RequestError for a metric that is unknown or cannot be measured, and for too few images.
    """
    count = comparison.generated.count
    check_count(count)
    values: dict[str, float] = {}
    reference_images = 0 if comparison.reference is None else len(comparison.reference)
    for name in applicable(metrics, Available(extractor, count, reference_images, comparison.has_class_ids)):
        values |= METRICS[name].measure(extractor, comparison)
    return Scores(extractor.name, count, reference, values, extractor.sha256, _notes(extractor, comparison))


def check_count(count: int) -> None:
    """Raise RequestError if there are fewer than MIN_SAMPLES images."""
    if count < MIN_SAMPLES:
        raise RequestError(
            f"{count} images are too few to score", remedy=f"give at least {MIN_SAMPLES}, better 1000", param="samples"
        )


def check_metrics(names: Sequence[str]) -> list[str]:
    """The names without duplicates. Raises RequestError for an unknown name, or an empty list."""
    if isinstance(names, str):  # otherwise each letter would be read as a name
        raise RequestError(
            f"metrics {names!r} are not a list", remedy="give a list of names, such as ['fd', 'pr']", param="metrics"
        )
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        problem = f"metric '{unknown[0]}' is unknown" if unknown else "no metric was named"
        raise RequestError(problem, remedy=f"choose from {', '.join(METRICS)}", param="metrics")
    return list(dict.fromkeys(names))


def metric_key(printed: str) -> str:
    """The key in METRICS for a printed name: 'fd' for 'FID' and 'FD(digits-classifier)'. A key is returned unchanged.

    Raises RequestError for an unknown name.
    """
    return check_metrics([_PRINTED.get(printed.partition("(")[0], printed)])[0]


def applicable(names: Sequence[str] | None, available: Available) -> list[str]:
    """The named metrics without duplicates, or all metrics that can be measured.

    Raises RequestError for a named metric that is unknown or cannot be measured.
    """
    if names is None:
        return [name for name, metric in METRICS.items() if metric.missing(available) is None]
    for name in check_metrics(names):
        missing = METRICS[name].missing(available)
        if missing is not None:
            raise RequestError(f"metric '{name}' cannot be measured: {missing}", remedy="leave it out", param="metrics")
    return check_metrics(names)


def moments(features: "torch.Tensor") -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] (divided by N - 1) of features [N, D], in float64 as EDM's references are."""
    statistics = fidelity("metric_fid").fid_features_to_statistics(features.double())
    return statistics["mu"], statistics["sigma"]


# d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) for N(mu_1, S_1) and N(mu_2, S_2) (Dowson and Landau 1982). For FID
# it is equation 6 of Heusel et al. 2017, arXiv 1706.08500.
def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """The squared Frechet distance between two Gaussians with means [D] and covariances [D, D]."""
    # tr (S_1 S_2)^(1/2) is the sum of the singular values of S_1^(1/2) S_2^(1/2). They are accurate for singular covariances
    # too and always real, unlike the square roots of the eigenvalues of S_1 S_2.
    product = symmetric_root(sigma1) @ symmetric_root(sigma2)
    cross = np.linalg.svd(product, compute_uv=False).sum()
    difference = mu1 - mu2
    distance = float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * cross)
    return max(distance, 0.0)  # rounding can make it slightly negative


def symmetric_root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance [D, D]. Eigenvalues that are negative from rounding count as 0."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    root: np.ndarray = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def frechet_name(extractor: Extractor) -> str:
    """The printed name of the Frechet distance: 'FID' for InceptionV3, otherwise 'FD(extractor)'."""
    return "FID" if extractor.is_inception else f"FD({extractor.name})"


def _frechet(extractor: Extractor, comparison: Comparison) -> dict[str, float]:
    distance = frechet_distance(*comparison.generated.moments(), comparison.mu, comparison.sigma)
    return {frechet_name(extractor): distance}


# MMD^2 with the kernel (x . y / D + 1)^3, averaged over subsets (Binkowski et al. 2018, arXiv 1801.01401, section 4).
def _kernel(extractor: Extractor, comparison: Comparison) -> dict[str, float]:
    metric_kid = fidelity("metric_kid")
    generated, reference = _tensors(comparison)
    size = min(KERNEL_SUBSET_SIZE, len(generated), len(reference))
    options = {"kid_subsets": KERNEL_SUBSETS, "kid_subset_size": size, "verbose": False}
    distance = metric_kid.kid_features_to_metric(generated, reference, **options)[metric_kid.KEY_METRIC_KID_MEAN]
    return {"KID" if extractor.is_inception else f"KD({extractor.name})": distance}


# Precision: the share of generated images that are closer to some reference image than that image's k-th nearest reference
# neighbour. Recall: the same with the roles exchanged (Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).
def _precision_recall(extractor: Extractor, comparison: Comparison) -> dict[str, float]:
    metric_prc = fidelity("metric_prc")
    generated, reference = _tensors(comparison)
    # save_cpu_ram keeps only prc_batch_size rows of the distance matrix in memory.
    rows = max(1, min(_NEIGHBOUR_BATCH, _NEIGHBOUR_VALUES // max(len(generated), len(reference))))
    options = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": rows, "save_cpu_ram": True}
    values = metric_prc.prc_features_to_metric(generated, reference, verbose=False, **options)
    return {name: values[name] for name in (metric_prc.KEY_METRIC_PRECISION, metric_prc.KEY_METRIC_RECALL)}


# exp(E_x KL(p(y|x) || p(y))), averaged over splits (Salimans et al. 2016, arXiv 1606.03498, section 4).
def _inception_score(extractor: Extractor, comparison: Comparison) -> dict[str, float]:
    return {"IS": comparison.generated.inception_score()}


def _class_accuracy(extractor: Extractor, comparison: Comparison) -> dict[str, float]:
    return {"class_accuracy": comparison.generated.right / comparison.generated.count}


def _tensors(comparison: Comparison) -> "tuple[torch.Tensor, torch.Tensor]":
    """The features of the generated images and of the reference."""
    import torch

    assert comparison.reference is not None  # `missing` has checked it
    return torch.from_numpy(comparison.generated.kept_features()), torch.from_numpy(comparison.reference)


def _nothing(available: Available) -> str | None:
    return None


def _reference_images(available: Available) -> str | None:
    if not available.reference_images:
        return "the reference is statistics, not images"
    return None if available.reference_images >= MIN_SAMPLES else "the reference has too few images"


def _inception(available: Available) -> str | None:
    if not available.extractor.is_inception:
        return f"it is defined by InceptionV3, not by {available.extractor.name}"
    return None if available.images >= SPLITS else f"{available.images} images are fewer than its {SPLITS} splits"


def _class_ids(available: Available) -> str | None:
    if not available.extractor.num_classes:
        return f"{available.extractor.name} does not know the reference's classes"
    return None if available.has_class_ids else "the classes of the images are unknown"


# Name of a metric in --metrics -> its functions.
METRICS = {
    "fd": Metric(_frechet, _nothing),
    "kd": Metric(_kernel, _reference_images),
    "pr": Metric(_precision_recall, _reference_images),
    "is": Metric(_inception_score, _inception),
    "class_accuracy": Metric(_class_accuracy, _class_ids),
}

# Printed name of a value, without the extractor's -> name of the metric.
_PRINTED = {"FID": "fd", "FD": "fd", "KID": "kd", "KD": "kd", "IS": "is", "precision": "pr", "recall": "pr"}


def _notes(extractor: Extractor, comparison: Comparison) -> tuple[str, ...]:
    count = comparison.generated.count
    few = count <= extractor.dim
    unpublished = extractor.is_inception and not few and count < PUBLISHED_SAMPLES
    accuracy = extractor.heldout_accuracy or 0
    poor = extractor.heldout_accuracy is not None and extractor.heldout_accuracy < POOR_ACCURACY
    notes = {
        f"{count} images are too few for {extractor.dim} features: the Frechet distance is overestimated": few,
        f"published FIDs use {PUBLISHED_SAMPLES} images; fewer give a larger FID": unpublished,
        f"{extractor.name} has an accuracy of only {accuracy:.1%} on held-out images, so its scores say little": poor,
        f"kd, precision and recall compare {KEPT_IMAGES} of the images, evenly spaced": count > KEPT_IMAGES,
    }
    return tuple(note for note, holds in notes.items() if holds)
