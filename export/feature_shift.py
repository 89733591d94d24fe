"""How far an engine moves the distribution of images, beside torch's on the same noise: what pixel by pixel tolerances miss."""

import numpy as np

from uni_instruct.evaluate import frechet_distance

# Of every colour a picture of so many squares each way.
SQUARES = 4
# What int8 may change of the feature distance (docs/export.md, "int8").
MAX_SHIFT = 0.02


def feature_shift(images: np.ndarray, truth: np.ndarray) -> float:
    """The Frechet distance between the two sets' features, as a share of the spread (trace of covariance) of torch's.

    images, truth: float [N, C, H, W] in about [-1, 1]; features are the means and the contrasts of 4x4 squares of a picture. No
    data set and no classifier is needed, so that every export can be held to it.
    """
    first, second = _features(images), _features(truth)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    distance = frechet_distance(first.mean(0), covariances[0], second.mean(0), covariances[1])
    return distance / max(float(np.trace(covariances[1])), 1e-12)


def _features(images: np.ndarray) -> np.ndarray:
    """[N, 2 C SQUARES^2]: the mean and the standard deviation of each square."""
    clipped = np.clip(images.astype(np.float64), -1, 1)
    rows = np.array_split(clipped, min(SQUARES, clipped.shape[2]), axis=2)
    squares = [square for row in rows for square in np.array_split(row, min(SQUARES, clipped.shape[3]), axis=3)]
    return np.concatenate([part for s in squares for part in (s.mean((2, 3)), s.std((2, 3)))], axis=1)
