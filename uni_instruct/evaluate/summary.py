"""Summaries of many images' features: sums, which most metrics are computed from, and a bounded number of features.

Sums of consecutive images are added in order, so that a score does not depend on which worker computed which sum.
"""

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from uni_instruct.evaluate.extractors import Features

# The metrics that compare single images (kd, pr) use at most this many, evenly spaced: more would take days and all memory.
KEPT_IMAGES = 50_000
# The number of splits of the inception score, and the seed of torch-fidelity's shuffle before it splits.
SPLITS, _SHUFFLE_SEED = 10, 2020


@dataclass(frozen=True, kw_only=True)
class SummaryPlan:
    """How the images 0..total-1 are summed up. with_scores: whether to compute the sums for the inception score."""

    total: int
    with_scores: bool = False

    @property
    def stride(self) -> int:
        """The features of every stride-th image are kept."""
        return -(-self.total // KEPT_IMAGES)

    def splits(self) -> np.ndarray:
        """The split of the inception score that each image belongs to: int64 [total]."""
        # As in torch-fidelity: position i of its shuffle has image order[i], and split s has N / 10 positions from s N / 10 on.
        order = np.random.RandomState(_SHUFFLE_SEED).permutation(self.total)
        ends = np.arange(1, SPLITS + 1) * self.total // SPLITS
        split = np.empty(self.total, dtype=np.int64)
        split[order] = np.searchsorted(ends, np.arange(self.total), side="right")
        return split


@dataclass(eq=False)
class Summary:
    """Sums over `count` images with features x.

    first: float64 [D], the sum of x. second: float64 [D, D], the sum of x x^T. kept: features float32 [K, D], in parts.
    right: the number of images that the extractor classifies correctly.
    probabilities float64 [SPLITS, C], negative_entropy and split_counts [SPLITS]: sums for the inception score, or None.
    """

    count: int
    first: np.ndarray
    second: np.ndarray
    kept: list[np.ndarray] = field(repr=False)
    right: int = 0
    probabilities: np.ndarray | None = None
    negative_entropy: np.ndarray | None = None
    split_counts: np.ndarray | None = None

    def add(self, later: "Summary") -> None:
        """Add the sums of the images that follow these."""
        self.count += later.count
        self.first += later.first
        self.second += later.second
        self.right += later.right
        self.kept.extend(later.kept)
        self.probabilities = _sum(self.probabilities, later.probabilities)
        self.negative_entropy = _sum(self.negative_entropy, later.negative_entropy)
        self.split_counts = _sum(self.split_counts, later.split_counts)

    def owned(self) -> "Summary":
        """A copy in new memory. Arrays from Ray's object store are read-only, and stay in the store while they are used."""
        return copy.deepcopy(self)

    def kept_features(self) -> np.ndarray:
        """The kept features: float32 [K, D]."""
        self.kept = [concatenate_parts(self.kept)]
        return self.kept[0]

    # mu = sum x / N, sigma = (sum x x^T - N mu mu^T) / (N - 1), as EDM's fid.py has them.
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and covariance [D, D], float64."""
        mu = self.first / self.count
        return mu, (self.second - self.count * np.outer(mu, mu)) / max(1, self.count - 1)

    # exp(mean over x of KL(p(y|x) || p(y))) for each split, then the mean over splits (Salimans et al. 2016).
    def inception_score(self) -> float:
        """The inception score, the mean over splits. It needs a summary with_scores."""
        assert self.probabilities is not None
        assert self.negative_entropy is not None
        assert self.split_counts is not None
        scores = []
        for probabilities, negative_entropy, count in zip(
            self.probabilities, self.negative_entropy, self.split_counts, strict=True
        ):
            marginal = (probabilities / count).clip(np.finfo(np.float64).tiny)  # so that 0 log 0 is 0, not nan
            scores.append(np.exp(negative_entropy / count - (marginal * np.log(marginal)).sum()))
        return float(np.mean(scores))


def concatenate_parts(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate the parts. The list is emptied meanwhile, so that no part is in memory twice for long."""
    if len(parts) == 1:
        return parts.pop()
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    end = len(whole)
    while parts:
        start = end - len(parts[-1])
        whole[start:end] = parts.pop()
        end = start
    return whole


def _sum(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else first + second


def summarise_features(
    features: "Features",
    plan: SummaryPlan,
    start: int = 0,
    expected: np.ndarray | None = None,
    splits: np.ndarray | None = None,
) -> Summary:
    """The summary of the images start, start + 1, ...

    expected: the true class of each image, or None. splits: `plan.splits()`, computed here if it is not given.
    """
    values, logits = features.features.numpy(), features.logits.numpy()
    exact = values.astype(np.float64)
    indices = np.arange(start, start + len(values))
    summary = Summary(
        count=len(values),
        first=exact.sum(0),
        second=exact.T @ exact,
        kept=[values[indices % plan.stride == 0]],
        right=0 if expected is None or not logits.shape[1] else int((logits.argmax(1) == expected).sum()),
    )
    if plan.with_scores:
        split = (plan.splits() if splits is None else splits)[indices]
        _add_probabilities(summary, logits.astype(np.float64), split)
    return summary


def _add_probabilities(summary: Summary, logits: np.ndarray, split: np.ndarray) -> None:
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    summary.probabilities = np.zeros((SPLITS, p.shape[1]))
    for number in np.unique(split):
        summary.probabilities[number] = p[split == number].sum(0)
    summary.negative_entropy = np.bincount(split, (p * log_p).sum(1), SPLITS)
    summary.split_counts = np.bincount(split, minlength=SPLITS)
