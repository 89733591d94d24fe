"""Are samples copies of training images? Compares their nearest-neighbour distances with those among training images."""

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
QUERIES = 500  # number of samples, and of training images, whose neighbours are searched
READ_BATCH = 1024
MAX_SIDE = 32  # larger images are averaged down to about this many pixels a side before they are compared
MAX_BYTES = 400e6  # of a larger data set, evenly spaced images of about this many bytes are searched
COPIED_BELOW = 1 / 3  # ratio of the distances to the nearest and second nearest image, see `_copied`


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Nearest neighbours of Q queries, nearest first: distances float32 [Q, k] and indices int64 [Q, k]."""

    distances: Tensor
    indices: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class NeighbourDistances:
    """The nearest training images of samples and, for comparison, of other training images. space: pixels or features."""

    space: str
    unit: str
    samples: Neighbours
    training: Neighbours

    @property
    def medians(self) -> tuple[float, float]:
        """Median distance to the nearest training image: of samples, then of training images."""
        return self.samples.distances[:, 0].median().item(), self.training.distances[:, 0].median().item()

    @property
    def nearer_share(self) -> float:
        """Share of samples whose nearest training image is closer than the median among training images. 0.5 is expected."""
        # P(d_1(sample) < median d_1(training)): 0.5 if samples are as close to the data as the data is to itself.
        return (self.samples.distances[:, 0] < self.medians[1]).double().mean().item()

    @property
    def copied_share(self) -> tuple[float, float]:
        """Shares of samples and of training images that count as copies: d_1 < d_2 / 3.

        d_1 and d_2 are the distances to the nearest and second nearest image (Yoon et al. 2023; Gu et al., arXiv 2310.02664).
        """
        return _copied(self.samples.distances), _copied(self.training.distances)


def searched_indices(dataset: Dataset) -> np.ndarray:
    """Indices of the training images that are searched, int64 [N]: all, or evenly spaced ones of at most MAX_BYTES."""
    most = max(QUERIES, int(MAX_BYTES / math.prod(dataset.image_shape)))
    count = min(len(dataset), most)
    return np.arange(count) * len(dataset) // count


def by_pixels(dataset: Dataset, samples: np.ndarray) -> NeighbourDistances:
    """Compare by the root-mean-square difference of pixels, in grey levels of 0..255. samples: uint8 [Q, H, W, C]."""
    searched = searched_indices(dataset)
    probes = _probes(len(searched))

    def parts() -> Iterator[Tensor]:
        for start in range(0, len(searched), READ_BATCH):
            yield _pixels(dataset.images(searched[start : start + READ_BATCH]))

    queries = _pixels(samples), _pixels(dataset.images(searched[probes]))
    return _neighbour_distances("pixels", "grey levels, RMS", *queries, probes, searched, parts())


def by_features(evaluator: Evaluator, samples: np.ndarray) -> NeighbourDistances | None:
    """Compare by distance in the features of the scores. None if the evaluator has no features of the reference images."""
    if evaluator.features is None or not isinstance(evaluator.reference, Dataset):
        return None
    searched = searched_indices(evaluator.reference)
    probes = _probes(len(searched))
    features = evaluator.features.features[torch.from_numpy(searched)].float()
    queries = evaluator.extractor([samples]).features.float(), features[torch.from_numpy(probes)]
    return _neighbour_distances(
        f"features of {evaluator.extractor.name}", "", *queries, probes, searched, features.split(READ_BATCH)
    )


def nearest(queries: Tensor, parts: Iterable[Tensor], k: int, excluded: Tensor) -> Neighbours:
    """For each of queries [Q, D], the k nearest rows among all parts [B, D], by Euclidean distance.

    excluded [Q]: the row that is the query itself and must not be found; -1 for none. Rounding errors are about 1e-3 |x|.
    """
    best = torch.empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64)
    square, start = queries.square().sum(1, keepdim=True), 0
    for part in parts:
        # |q - x|^2 = |q|^2 - 2 q x + |x|^2: one matrix product instead of all differences. Rounding can make it negative.
        distances = (square - 2 * queries @ part.T + part.square().sum(1)).clamp(min=0).sqrt()
        within = (excluded >= start) & (excluded < start + len(part))
        distances[within, excluded[within] - start] = math.inf
        rows = torch.arange(start, start + len(part)).expand(len(queries), -1)
        joined, all_rows = torch.cat([best, distances], 1), torch.cat([indices, rows], 1)
        best, chosen = joined.topk(min(k, joined.shape[1]), largest=False)
        indices, start = all_rows.gather(1, chosen), start + len(part)
    return Neighbours(best, indices)


def _neighbour_distances(
    space: str, unit: str, samples: Tensor, training: Tensor, probes: np.ndarray, searched: np.ndarray, parts: Iterable[Tensor]
) -> NeighbourDistances:
    """Search for samples and training images together, so that the data is read once. Returned indices are the data set's."""
    nobody = torch.full((len(samples),), -1, dtype=torch.int64)
    found = nearest(torch.cat([samples, training]), parts, K, torch.cat([nobody, torch.from_numpy(probes)]))
    indices = torch.from_numpy(searched)[found.indices]
    count = len(samples)
    return NeighbourDistances(
        space=space,
        unit=unit,
        samples=Neighbours(found.distances[:count], indices[:count]),
        training=Neighbours(found.distances[count:], indices[count:]),
    )


def _probes(count: int) -> np.ndarray:
    """Positions of at most QUERIES of the searched images, evenly spaced."""
    probes = min(count, QUERIES)
    return np.arange(probes) * count // probes


def _pixels(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, C] -> float32 [B, D]; large images are averaged down. The distance of two rows is the RMS difference."""
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    factor = max(1, min(values.shape[2:]) // MAX_SIDE)
    flat = F.avg_pool2d(values, factor).flatten(1) if factor > 1 else values.flatten(1)
    # |a - b| / sqrt(D) is the root-mean-square difference of D values. Centred, because `nearest` loses fewer digits then.
    return (flat - 127.5) / math.sqrt(flat.shape[1])


# The share with d_1 < d_2 / 3: a copy is much nearer to one image than to all others (arXiv 2310.02664).
def _copied(distances: Tensor) -> float:
    if distances.shape[1] < 2:
        return 0.0
    return (distances[:, 0] < COPIED_BELOW * distances[:, 1]).double().mean().item()
