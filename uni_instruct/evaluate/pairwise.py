"""What compares single images with each other: kernel distance, precision and recall. NumPy, in bounded memory.

The numbers are torch-fidelity's up to rounding. It sorts every row of distances out; what counts are the few least of a row,
or whether there is one, which takes a sixth of the time.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from uni_instruct.engines.threads import usable_cpus

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE, _KERNEL_SEED = 100, 1000, 2020
# Products that a thread has in memory at once: so many columns of so many rows. A cache holds most of them.
ROWS, COLUMNS = 256, 4096
# Of so many columns the nearest is found first; and coordinates of such columns that are in memory at once.
_GROUP, _GATHERED = 64, 2**22


# MMD^2 with the kernel (x . y / D + 1)^3, the mean over subsets (Binkowski et al. 2018, arXiv 1801.01401, section 4).
def kernel_distance(generated: np.ndarray, reference: np.ndarray) -> float:
    """The unbiased estimate over torch-fidelity's subsets of generated [N, D] and reference [M, D], float32."""
    size, rng = min(KERNEL_SUBSET_SIZE, len(generated), len(reference)), np.random.RandomState(_KERNEL_SEED)
    total = 0.0
    for _ in range(KERNEL_SUBSETS):
        x = generated[rng.choice(len(generated), size, replace=False)]
        y = reference[rng.choice(len(reference), size, replace=False)]
        within = sum((kernels.sum() - np.trace(kernels)) / (size * (size - 1)) for kernels in (_kernels(x, x), _kernels(y, y)))
        total += within - 2 * _kernels(x, y).sum() / size**2
    return float(total / KERNEL_SUBSETS)


def _kernels(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = (x @ y.T).astype(np.float64) / x.shape[1] + 1
    kernels: np.ndarray = base * base * base  # a power takes ten times as long
    return kernels


# Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 and 2.
def precision_recall(generated: np.ndarray, reference: np.ndarray, neighbours: int) -> tuple[float, float]:
    """The share of generated [N, D] within a reference's reach, and of reference [M, D] within a generated one's.

    A point's reach is the distance to its k-th nearest of its own set, itself left out. float32, more than k points each.
    """
    # Distances stay the same between shorter vectors, whose products lose fewer digits.
    middle = reference.mean(0, dtype=np.float64).astype(np.float32)
    ours, theirs = generated - middle, reference - middle
    precision = covered(ours, theirs, squared_radii(theirs, neighbours)).mean()
    recall = covered(theirs, ours, squared_radii(ours, neighbours)).mean()
    return float(precision), float(recall)


# |a - b|^2 = |a|^2 - 2 (a . b - |b|^2 / 2): the nearest b has the largest product of (a, 1) and (b, -|b|^2 / 2).
def squared_radii(points: np.ndarray, neighbours: int) -> np.ndarray:
    """The squared distance of each point [N, D] to its k-th nearest other one: float32 [N]."""
    count = neighbours + 1  # itself is the first
    group = max(1, min(_GROUP, len(points) // count))
    columns = _extended(points, -_squares(points) / 2)
    # Groups are of one size: the last is filled up with what is infinitely far.
    filling = np.zeros((-len(points) % group, columns.shape[1]), np.float32)
    filling[:, -1] = np.finfo(np.float32).min / 2  # infinity itself is no number once BLAS multiplies it by a 0
    columns = np.concatenate([columns, filling])
    step = max(1, COLUMNS // group) * group

    def radii(rows: slice) -> np.ndarray:
        asked = _asked(points[rows])
        nearest = [
            np.maximum.reduce((columns[start : start + step] @ asked).reshape(-1, group, asked.shape[1]), axis=1)
            for start in range(0, len(columns), step)
        ]
        # The k + 1 nearest of all are in those k + 1 groups whose nearest are the nearest.
        chosen = np.argpartition(-np.concatenate(nearest), count - 1, axis=0)[:count].T
        return _least_squares(points, rows, (chosen[:, :, None] * group + np.arange(group)).reshape(len(chosen), -1), count)

    return _by_rows(radii, len(points))


def _least_squares(points: np.ndarray, rows: slice, candidates: np.ndarray, count: int) -> np.ndarray:
    """Of each of the rows the count-th least squared distance to its candidates, indices [rows, K]; from N on they are none."""
    out = np.empty(len(candidates), np.float32)
    size = max(1, _GATHERED // (candidates.shape[1] * points.shape[1]))
    for start in range(0, len(candidates), size):
        chosen = candidates[start : start + size]
        differences = points[np.minimum(chosen, len(points) - 1)]
        differences -= points[rows][start : start + size, None]
        squared = np.einsum("nkd,nkd->nk", differences, differences)
        squared[chosen >= len(points)] = np.inf
        out[start : start + size] = np.partition(squared, count - 1, axis=1)[:, count - 1]
    return out


# |a - b|^2 <= r_b^2 for some b where max_b (a . b + (r_b^2 - |b|^2) / 2) >= |a|^2 / 2.
def covered(points: np.ndarray, centres: np.ndarray, squared: np.ndarray) -> np.ndarray:
    """Whether each of points [N, D] lies in the ball of one of centres [M, D], whose squared radii are [M]: bool [N]."""
    columns, enough = _extended(centres, (squared - _squares(centres)) / 2), _squares(points) / 2

    def is_covered(rows: slice) -> np.ndarray:
        found = np.zeros(rows.stop - rows.start, dtype=bool)
        left = np.arange(rows.start, rows.stop)
        # Most are found early and asked no more.
        for start in range(0, len(columns), COLUMNS):
            inside = (columns[start : start + COLUMNS] @ _asked(points[left])).max(0) >= enough[left]
            found[left[inside] - rows.start] = True
            left = left[~inside]
            if not len(left):
                break
        return found

    return _by_rows(is_covered, len(points))


def _by_rows(make: Callable[[slice], np.ndarray], count: int) -> np.ndarray:
    rows = [slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS)]
    with ThreadPoolExecutor(usable_cpus()) as threads:
        return np.concatenate(list(threads.map(make, rows)))


def _squares(points: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("nd,nd->n", points, points))


def _asked(points: np.ndarray) -> np.ndarray:
    """(a, 1) of each point, in columns."""
    return _extended(points, np.ones(len(points), np.float32)).T


def _extended(points: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The points with one coordinate more: float32 [N, D + 1]."""
    out = np.empty((len(points), points.shape[1] + 1), np.float32)
    out[:, :-1], out[:, -1] = points, last
    return out
