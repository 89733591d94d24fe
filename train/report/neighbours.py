"""Are samples copies? Their nearest training images, beside how near training images are to each other."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uni_instruct.data import Dataset
from uni_instruct.evaluate import Evaluator

K = 3
QUERIES = 500  # samples, and as many training images, whose neighbours are looked for
READ_BATCH = 1024
MAX_SIDE = 32  # larger images are compared averaged down to about this
MAX_BYTES = 400e6  # of training images that are read: above that, evenly spaced ones
COPIED_BELOW = 1 / 3


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Nearest first: distances float32 [Q, k] and indices int64 [Q, k]."""

    distances: Tensor
    indices: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Closeness:
    """How near samples and training images are to their nearest other training images, in a space with its unit."""

    space: str
    unit: str
    samples: Neighbours
    training: Neighbours

    @property
    def medians(self) -> tuple[float, float]:
        """Of the distance to the nearest training image: of samples, of training images."""
        return self.samples.distances[:, 0].median().item(), self.training.distances[:, 0].median().item()

    @property
    def nearer_share(self) -> float:
        """Share of samples nearer to a training image than half of the training images are: 0.5 is as near as data to data."""
        return (self.samples.distances[:, 0] < self.medians[1]).double().mean().item()

    @property
    def copied_share(self) -> tuple[float, float]:
        """Share whose nearest is under a third as far as the second (Yoon et al. 2023; Gu et al., arXiv 2310.02664).

        Of samples, and of training images for comparison.
        """
        return _copied(self.samples.distances), _copied(self.training.distances)


def searched_indices(dataset: Dataset) -> np.ndarray:
    """The training images that are compared with: all, or as many as may be read, evenly spaced: int64 [N]."""
    most = max(QUERIES, int(MAX_BYTES / math.prod(dataset.image_shape)))
    count = min(len(dataset), most)
    return np.arange(count) * len(dataset) // count


def by_pixels(dataset: Dataset, samples: np.ndarray) -> Closeness:
    """Nearest by root-mean-square difference of pixels, in grey levels of 0..255; samples are uint8 [Q, H, W, C]."""
    searched = searched_indices(dataset)
    probes = _probes(len(searched))

    def parts() -> Iterator[Tensor]:
        for start in range(0, len(searched), READ_BATCH):
            yield _pixels(dataset.images(searched[start : start + READ_BATCH]))

    queries = _pixels(samples), _pixels(dataset.images(searched[probes]))
    return _closeness("pixels", "grey levels, RMS", *queries, probes, searched, parts())


def by_features(evaluator: Evaluator, samples: np.ndarray) -> Closeness | None:
    """Nearest in the features that scores are measured in; None where the reference's features are not kept."""
    if evaluator.features is None or not isinstance(evaluator.reference, Dataset):
        return None
    searched = searched_indices(evaluator.reference)
    probes = _probes(len(searched))
    features = evaluator.features.features[torch.from_numpy(searched)].float()
    queries = evaluator.extractor([samples]).features.float(), features[torch.from_numpy(probes)]
    return _closeness(f"features of {evaluator.extractor.name}", "", *queries, probes, searched, features.split(READ_BATCH))


def nearest(queries: Tensor, parts: Iterable[Tensor], k: int, excluded: Tensor) -> Neighbours:
    """The k nearest of all rows of the parts [B, D] to each of queries [Q, D], by Euclidean distance.

    excluded [Q] is the row that a query must not find, itself; -1 for none. Rounding moves a distance by about 1e-3 |x|.
    """
    best = torch.empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64)
    square, start = queries.square().sum(1, keepdim=True), 0
    for part in parts:
        # |q - x|^2 = |q|^2 - 2 q x + |x|^2: one matrix product instead of all differences
        distances = (square - 2 * queries @ part.T + part.square().sum(1)).clamp(min=0).sqrt()
        within = (excluded >= start) & (excluded < start + len(part))
        distances[within, excluded[within] - start] = math.inf
        rows = torch.arange(start, start + len(part)).expand(len(queries), -1)
        joined, all_rows = torch.cat([best, distances], 1), torch.cat([indices, rows], 1)
        best, chosen = joined.topk(min(k, joined.shape[1]), largest=False)
        indices, start = all_rows.gather(1, chosen), start + len(part)
    return Neighbours(best, indices)


def _closeness(
    space: str, unit: str, samples: Tensor, training: Tensor, probes: np.ndarray, searched: np.ndarray, parts: Iterable[Tensor]
) -> Closeness:
    """Both searches at once, so that the training images are read once. Indices become those of the data set."""
    nobody = torch.full((len(samples),), -1, dtype=torch.int64)
    found = nearest(torch.cat([samples, training]), parts, K, torch.cat([nobody, torch.from_numpy(probes)]))
    indices = torch.from_numpy(searched)[found.indices]
    count = len(samples)
    return Closeness(
        space=space,
        unit=unit,
        samples=Neighbours(found.distances[:count], indices[:count]),
        training=Neighbours(found.distances[count:], indices[count:]),
    )


def _probes(count: int) -> np.ndarray:
    """At most QUERIES of the searched images, evenly spaced."""
    probes = min(count, QUERIES)
    return np.arange(probes) * count // probes


def _pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, D], averaged down where large; the distance of two rows is the RMS of pixels."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    factor = max(1, min(values.shape[2:]) // MAX_SIDE)
    flat = F.avg_pool2d(values, factor).flatten(1) if factor > 1 else values.flatten(1)
    # Over sqrt(D), the Euclidean distance of rows is the root-mean-square of pixels; centred, for fewer digits are lost.
    return (flat - 127.5) / math.sqrt(flat.shape[1])


# d_1 < d_2 / 3: a copy is much nearer to one image than to any other (arXiv 2310.02664).
def _copied(distances: Tensor) -> float:
    if distances.shape[1] < 2:
        return 0.0
    return (distances[:, 0] < COPIED_BELOW * distances[:, 1]).double().mean().item()
