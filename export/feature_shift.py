"""How far an engine shifts the distribution of images from torch's on the same noise. Tolerances per pixel cannot see that."""

import numpy as np

from uni_instruct.evaluate import frechet_distance

# Each colour channel is divided into SQUARES x SQUARES squares.
SQUARES = 4
# The largest `feature_shift` that is allowed of an int8 engine (docs/export.md, "int8").
MAX_SHIFT = 0.02


def feature_shift(images: np.ndarray, truth: np.ndarray) -> float:
    """The squared Frechet distance between the features of both sets, divided by the trace of the covariance of torch's.

    images, truth: float [N, C, H, W] in about [-1, 1], N > 1. Features are the mean and the standard deviation of each of 4x4
    squares of a picture. This needs neither a data set nor a classifier, so every export can check it.
    """
    # d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), returned as d^2 / tr(S_2)
    first, second = _features(images), _features(truth)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    distance = frechet_distance(first.mean(0), covariances[0], second.mean(0), covariances[1])
    return distance / max(float(np.trace(covariances[1])), 1e-12)


def _features(images: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of each square: [N, 2 C SQUARES^2]."""
    clipped = np.clip(images.astype(np.float64), -1, 1)
    rows = np.array_split(clipped, min(SQUARES, clipped.shape[2]), axis=2)
    squares = [square for row in rows for square in np.array_split(row, min(SQUARES, clipped.shape[3]), axis=3)]
    return np.concatenate([part for s in squares for part in (s.mean((2, 3)), s.std((2, 3)))], axis=1)
