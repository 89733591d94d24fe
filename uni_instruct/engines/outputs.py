"""What an engine gives, and how far it may be from what torch gives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Outputs(NamedTuple):
    """pixels uint8 [B, H, W, C]; images, the same before rounding, float32 [B, C, H, W] in about [-1, 1].

    Where the spec makes no pictures, images are a VAE's latents, and pixels is empty: uint8 [0, H, W, C].
    """

    pixels: np.ndarray
    images: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest relative L2 distance before rounding, and of uint8 pixels the least PSNR and the largest difference."""

    relative_l2: float
    pixel_difference: int
    psnr_db: float = 0.0

    def tightened(self, share: float) -> "Tolerance":
        """With that share of every allowed difference; a PSNR is a difference's logarithm."""
        return Tolerance(
            relative_l2=share * self.relative_l2,
            pixel_difference=int(share * self.pixel_difference),
            psnr_db=self.psnr_db - 20 * math.log10(share) if self.psnr_db else 0.0,
        )


# precision -> what its engines must keep; docs/export.md has the measurements behind it.
TOLERANCES = {
    "fp32": Tolerance(relative_l2=1e-5, pixel_difference=1),
    "fp16": Tolerance(relative_l2=3e-3, pixel_difference=3, psnr_db=52.0),
    "bf16": Tolerance(relative_l2=2.5e-2, pixel_difference=4, psnr_db=50.0),
    # Of int8 some pixel is always far off: what counts is how many (the PSNR), and the feature distance at the export.
    "int8": Tolerance(relative_l2=6e-2, pixel_difference=255, psnr_db=45.0),
}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far an engine's images are from torch's: relative L2 before rounding, largest difference and PSNR of pixels."""

    relative_l2: float
    pixel_difference: int
    psnr_db: float

    def problem(self, tolerance: Tolerance) -> str:
        """What is out of tolerance, in words; '' for nothing."""
        if not self.relative_l2 <= tolerance.relative_l2:  # NaN is not
            return f"it differs from torch by {self.relative_l2:.1e} (relative L2), more than {tolerance.relative_l2:.0e}"
        if self.pixel_difference > tolerance.pixel_difference:
            return f"a pixel differs from torch's by {self.pixel_difference} levels, more than {tolerance.pixel_difference}"
        if self.psnr_db < tolerance.psnr_db:
            return f"its pixels have a PSNR of {self.psnr_db:.1f} dB to torch's, less than {tolerance.psnr_db:.0f}"
        return ""


def agreement(batches: Sequence[Outputs], truth: np.ndarray) -> Agreement:
    """The worst over some batches, each of torch's first images, float32 [N, C, H, W]."""
    pixels = to_uint8(truth)
    difference = [np.abs(batch.pixels.astype(int) - pixels[: len(batch.pixels)]).max(initial=0) for batch in batches]
    return Agreement(
        relative_l2=max(relative_l2(batch.images, truth[: len(batch.images)]) for batch in batches),
        pixel_difference=max(map(int, difference)),
        psnr_db=min_psnr_db([batch.pixels for batch in batches], pixels),
    )


def relative_l2(images: np.ndarray, truth: np.ndarray) -> float:
    """||images - truth|| / ||truth||."""
    return float(np.linalg.norm(images.astype(np.float64) - truth) / max(float(np.linalg.norm(truth)), 1e-12))


def psnr_db(pixels: np.ndarray, truth: np.ndarray) -> float:
    """20 log10(255 / RMSE) of uint8 pixels; 120 dB where they are equal."""
    rmse = float(np.sqrt(np.mean((pixels.astype(np.float64) - truth) ** 2)))
    return 20 * math.log10(255 / max(rmse, 255e-6))


def min_psnr_db(batches: Sequence[np.ndarray], truth: np.ndarray) -> float:
    """The least PSNR of the largest batch, and of it with another batch's images in the place of its first ones.

    Of a few images alone a PSNR says which images they are: those of one int8 engine lie up to 3 dB apart.
    """
    whole = max(batches, key=len)
    return min(psnr_db(np.concatenate([batch, whole[len(batch) :]]), truth[: len(whole)]) for batch in batches)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] float32 [B, C, H, W] to uint8 [B, H, W, C], bit for bit as `networks.one_step.to_uint8`."""
    return np.clip(images * 127.5 + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
