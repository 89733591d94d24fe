"""The outputs of an engine, and how far they may be from torch's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Outputs(NamedTuple):
    """pixels: uint8 [B, H, W, C]. images: the same before rounding, float32 [B, C, H, W] in about [-1, 1].

    If the spec makes no pictures, images are a VAE's latents, and pixels is empty: uint8 [0, H, W, C].
    """

    pixels: np.ndarray
    images: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far an engine may be from torch.

    relative_l2: the largest relative L2 distance before rounding. pixel_difference: the largest difference of a uint8 value.
    psnr_db: the lowest PSNR of the pixels; 0 for no bound.
    """

    relative_l2: float
    pixel_difference: int
    psnr_db: float = 0.0

    def tightened(self, share: float) -> "Tolerance":
        """The tolerance with every allowed difference multiplied by `share`, in (0, 1].

        A PSNR is -20 log10 of a difference, so its bound rises by -20 log10(share).
        """
        return Tolerance(
            relative_l2=share * self.relative_l2,
            pixel_difference=int(share * self.pixel_difference),
            psnr_db=self.psnr_db - 20 * math.log10(share) if self.psnr_db else 0.0,
        )


# Precision -> the tolerance of its engines. docs/export.md has the measurements that the numbers come from.
TOLERANCES = {
    "fp32": Tolerance(relative_l2=1e-5, pixel_difference=1),
    "fp16": Tolerance(relative_l2=3e-3, pixel_difference=3, psnr_db=52.0),
    "bf16": Tolerance(relative_l2=2.5e-2, pixel_difference=4, psnr_db=50.0),
    # In int8 some pixel is always far off, so a largest difference says nothing. The PSNR bounds how many there are, and the
    # export also checks the feature distance (export/feature_shift.py).
    "int8": Tolerance(relative_l2=6e-2, pixel_difference=255, psnr_db=45.0),
}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far an engine's images are from torch's: relative L2 before rounding; largest difference and PSNR of the pixels."""

    relative_l2: float
    pixel_difference: int
    psnr_db: float

    def problem(self, tolerance: Tolerance) -> str:
        """What is out of tolerance, in words; '' if nothing is."""
        if not self.relative_l2 <= tolerance.relative_l2:  # `not <=`, as NaN must fail too
            return (
                f"its images differ from torch's by a relative L2 distance of {self.relative_l2:.1e} "
                f"(at most {tolerance.relative_l2:.0e} is allowed)"
            )
        if self.pixel_difference > tolerance.pixel_difference:
            return (
                f"a pixel differs from torch's by {self.pixel_difference} of 255 levels "
                f"(at most {tolerance.pixel_difference} are allowed)"
            )
        if self.psnr_db < tolerance.psnr_db:
            return (
                f"the PSNR between its pixels and torch's is {self.psnr_db:.1f} dB "
                f"(at least {tolerance.psnr_db:.0f} dB is required)"
            )
        return ""


def agreement(batches: Sequence[Outputs], truth: np.ndarray) -> Agreement:
    """The worst values over all batches. truth: torch's images, float32 [N, C, H, W]; each batch holds the first of them."""
    pixels = to_uint8(truth)
    difference = [np.abs(batch.pixels.astype(int) - pixels[: len(batch.pixels)]).max(initial=0) for batch in batches]
    return Agreement(
        relative_l2=max(relative_l2(batch.images, truth[: len(batch.images)]) for batch in batches),
        pixel_difference=max(map(int, difference)),
        psnr_db=min_psnr_db([batch.pixels for batch in batches], pixels),
    )


def relative_l2(images: np.ndarray, truth: np.ndarray) -> float:
    """The relative L2 distance, ||images - truth|| / ||truth||."""
    return float(np.linalg.norm(images.astype(np.float64) - truth) / max(float(np.linalg.norm(truth)), 1e-12))


def psnr_db(pixels: np.ndarray, truth: np.ndarray) -> float:
    """PSNR = 20 log10(255 / RMSE) of uint8 pixels, in dB. Equal pixels have 120 dB, the upper limit."""
    rmse = float(np.sqrt(np.mean((pixels.astype(np.float64) - truth) ** 2)))
    return 20 * math.log10(255 / max(rmse, 255e-6))


def min_psnr_db(batches: Sequence[np.ndarray], truth: np.ndarray) -> float:
    """The lowest PSNR of the batches. A smaller batch is completed with the remaining images of the largest one.

    So each PSNR is taken over the same images. A PSNR over a few images depends on which they are: with one int8 engine, it
    varied by up to 3 dB.
    """
    whole = max(batches, key=len)
    return min(psnr_db(np.concatenate([batch, whole[len(batch) :]]), truth[: len(whole)]) for batch in batches)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Round float32 [B, C, H, W] in [-1, 1] to uint8 [B, H, W, C]. Equal to `networks.one_step.to_uint8`, bit for bit."""
    return np.clip(images * 127.5 + 128, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
