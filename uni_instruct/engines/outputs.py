"""What an engine gives: pixels, and the values before they are rounded."""

from typing import NamedTuple

import numpy as np


class Outputs(NamedTuple):
    """pixels uint8 [B, H, W, C]; images, the same before rounding, float32 [B, C, H, W] in about [-1, 1]."""

    pixels: np.ndarray
    images: np.ndarray
