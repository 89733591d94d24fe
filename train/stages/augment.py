"""EDM's non-leaking augmentation: geometric transforms of images, which the network sees as nine labels.

Karras et al. 2022, arXiv 2206.00364, appendix F.2. The labels describe the whole transform: images are transformed from the
labels alone, so that the labels always match the image. Zero labels mean no transform; sampling uses these.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from uni_instruct.errors import RequestError

# x-flip; y-flip; scale; rotation (cos - 1, sin); anisotropy (w cos, w sin of its direction); translation (x, y).
AUGMENT_LABELS = 9

SCALE_STD = 0.2  # of log2 of the magnification
ANISOTROPY_STD = 0.2  # of log2 of the stretch along a direction; across it the image is compressed by the same factor
TRANSLATION_STD = 0.125  # as a fraction of the width and of the height
AXIS_PROBABILITY = 0.5  # probability that the stretch is horizontal or vertical, not in a random direction


def open_pipe(probability: float, mirror: bool) -> "AugmentPipe | None":
    """The augmentation of a recipe; None with probability 0. As in EDM, x-flips are then off as well."""
    return AugmentPipe(probability=probability, mirror=mirror) if probability else None


@dataclass(frozen=True, kw_only=True)
class AugmentPipe:
    """Settings of the augmentation. EDM's probability is 0.12 on CIFAR-10 and 0.15 on FFHQ and AFHQ at 64x64.

    Scale, rotation, anisotropy and translation are each applied to an image with `probability`. The y-flip is drawn for half
    of the images and then also kept with `probability`. The x-flip is applied to half of all images, whatever `probability`
    is: EDM doubles its data with it. `mirror=False` switches both flips off, for digits and text. Their labels would keep
    mirrored digits out of the samples, but the network would spend capacity on images that are never wanted.
    """

    probability: float
    mirror: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise RequestError(
                f"augmentation probability is {self.probability}", remedy="give a number from 0 to 1", param="probability"
            )

    def draw(self, batch: int, rng: torch.Generator) -> "Augmentation":
        """One random transform per image, on the CPU.

        Draw for the global batch and slice it, so that images get the same transforms on any number of devices.
        """

        def uniform() -> Tensor:
            return torch.rand(batch, 1, generator=rng)

        def normal(columns: int = 1) -> Tensor:
            return torch.randn(batch, columns, generator=rng)

        def kept(values: Tensor) -> Tensor:
            return torch.where(uniform() < self.probability, values, 0.0)

        x_flip, y_flip = (uniform() < 0.5).float(), kept((uniform() < 0.5).float())
        scale, angle, stretch = kept(normal()), kept((2 * uniform() - 1) * math.pi), kept(normal())
        # Half a circle only. EDM draws from the full circle, where (w, r) and (-w, r + pi) have the same labels but are
        # different transforms.
        direction = torch.where(uniform() < AXIS_PROBABILITY, 0.0, (uniform() - 0.5) * math.pi)
        flips = torch.cat((x_flip, y_flip), dim=1) * self.mirror
        rotation = torch.cat((angle.cos() - 1, angle.sin()), dim=1)
        anisotropy = stretch * torch.cat((direction.cos(), direction.sin()), dim=1)
        return Augmentation(torch.cat((flips, scale, rotation, anisotropy, kept(normal(2))), dim=1))


@dataclass(frozen=True)
class Augmentation:
    """The transforms of a batch: `labels` float32 [B, AUGMENT_LABELS], in EDM's order.

    An image is flipped, magnified by 2^(0.2 n), rotated counter-clockwise, stretched by 2^(0.2 w) along a direction
    (counter-clockwise from x) and by the inverse across it, and moved right and down by 1/8 of its size per unit of the label.
    """

    labels: Tensor

    def __getitem__(self, part: slice) -> "Augmentation":
        """The transforms of some of the images."""
        return Augmentation(self.labels[part])

    def to(self, device: torch.device | str) -> "Augmentation":
        """The same transforms with their labels on a device."""
        return Augmentation(self.labels.to(device))

    def __call__(self, images: Tensor) -> Tensor:
        """Transformed images [B, C, H, W] of the same type, differentiable. Zero labels change no bit; flips only move pixels.

        Bicubic interpolation, reflected about the outermost pixels as in EDM. Values may overshoot [-1, 1] a little, as with
        EDM's filter. There is no low-pass filter before shrinking: the labels describe the aliasing too, and it is small at
        these scales.
        """
        # At least float32: half-precision coordinates would be off by whole pixels.
        precision = torch.promote_types(images.dtype, torch.float32)
        labels = self.labels.to(images.device, precision)
        x_flip, y_flip = (flag[:, None, None, None] for flag in labels[:, :2].bool().unbind(1))
        images = torch.where(x_flip, images.flip(3), images)
        images = torch.where(y_flip, images.flip(2), images)
        resampled = F.grid_sample(
            images.to(precision),
            _source_grid(labels, *images.shape[2:]),
            mode="bicubic",
            padding_mode="reflection",
            align_corners=True,
        )
        moved = labels[:, 2:].any(dim=1)[:, None, None, None]
        return torch.where(moved, resampled.to(images.dtype), images)


def augmented(images: Tensor, augmentation: Augmentation | None, part: slice) -> tuple[Tensor, Tensor | None]:
    """Transform images [b, C, H, W], the slice `part` of a global batch. Returns them with their labels [b, AUGMENT_LABELS].

    Without an augmentation the images are returned unchanged, with None.
    """
    if augmentation is None:
        return images, None
    own = augmentation[part].to(images.device)
    return own(images), own.labels


def _source_grid(labels: Tensor, height: int, width: int) -> Tensor:
    """Where each output pixel is read from: [B, H, W, (x, y)]; -1 and 1 are the centres of the outermost pixels."""
    # source = M^-1 (output - t): M^-1 from `_inverse_linear`, t the translation in pixels, the origin in the image's centre.
    (xx, xy), (yx, yy) = _inverse_linear(labels)
    x = torch.arange(width, device=labels.device) - (width - 1) / 2 - TRANSLATION_STD * width * labels[:, 7, None]
    y = torch.arange(height, device=labels.device) - (height - 1) / 2 - TRANSLATION_STD * height * labels[:, 8, None]
    x, y = x[:, None, :], y[:, :, None]
    # Sums of products rather than matrix products, whose rounding depends on the batch size.
    source_x, source_y = (a[:, None, None] * x + b[:, None, None] * y for a, b in ((xx, xy), (yx, yy)))
    return torch.stack((source_x * (2 / max(width - 1, 1)), source_y * (2 / max(height - 1, 1))), dim=-1)


def _inverse_linear(labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The linear map from output to input coordinates (x right, y down): the rows of R^-1 A^-1 / scale, each entry [B]."""
    _, _, scale, cos_minus_1, sin, a, b, _, _ = labels.unbind(1)
    cos = cos_minus_1 + 1
    # A^-1 = cosh k - sinh k (2 u u^T - 1) for the stretch 2^(0.2 w) = e^k along u = (cos r, -sin r), |r| <= pi/2.
    square = a**2 + b**2
    k = ANISOTROPY_STD * math.log(2) * torch.where(a < 0, -1.0, 1.0) * square.sqrt()
    cos_2r, sin_2r = (v / square.clamp_min(torch.finfo(labels.dtype).tiny) for v in (a**2 - b**2, 2 * a * b))
    along, across, mixed = k.cosh() - k.sinh() * cos_2r, k.cosh() + k.sinh() * cos_2r, k.sinh() * sin_2r
    shrink = torch.exp2(-SCALE_STD * scale)
    return (
        (shrink * (cos * along - sin * mixed), shrink * (cos * mixed - sin * across)),
        (shrink * (sin * along + cos * mixed), shrink * (sin * mixed + cos * across)),
    )
