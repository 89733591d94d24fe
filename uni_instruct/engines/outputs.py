"""What an engine gives: pixels, and the values before they are rounded."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from uni_instruct.spec import ModelSpec


class Outputs(NamedTuple):
    """pixels uint8 [B, H, W, C]; images, the same before rounding, float32 [B, C, H, W] in about [-1, 1].

    Where the spec makes no pictures, images are a VAE's latents, and pixels is empty: uint8 [0, H, W, C].
    """

    pixels: np.ndarray
    images: np.ndarray


def in_parts(
    spec: ModelSpec, noise: np.ndarray, class_ids: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """A batch as an engine may run it: whole, or where a decoder makes large pictures, a few images at a time."""
    size = spec.images_at_once or max(1, len(noise))
    for start in range(0, len(noise), size):
        part = slice(start, start + size)
        yield noise[part], None if class_ids is None else class_ids[part]
