"""G(z), the one-step generator: one evaluation of a denoiser at one noise level; and how its images become bytes."""

import torch
from torch import Tensor, nn

from uni_instruct.networks.denoiser import Denoiser


class OneStep(nn.Module):
    """The whole map from N(0, 1) noise to images that training, export and the torch engine share: `one_step` as a module."""

    def __init__(self, denoiser: Denoiser, sigma_init: float):
        super().__init__()
        self.denoiser, self.sigma_init = denoiser, sigma_init

    def forward(self, noise: Tensor, class_ids: Tensor | None = None) -> Tensor:
        """float32 [B, C, H, W] in about [-1, 1]; noise float32 [B, C, H, W], class_ids int64 [B] or None without classes."""
        return one_step(self.denoiser, noise, class_ids, self.sigma_init)


def one_step(denoiser: Denoiser, noise: Tensor, class_ids: Tensor | None, sigma_init: float) -> Tensor:
    """G(z) = D(sigma_init z; sigma_init): float32 [B, C, H, W] in about [-1, 1]."""
    # In an exported graph sigma is one constant for the whole batch, so that everything that depends on it alone is folded.
    # Elsewhere each image has its own: products of one row and of many are not summed alike, to the last bit.
    levels = 1 if torch.compiler.is_exporting() else len(noise)
    sigma = noise.new_full((levels, 1, 1, 1), sigma_init)
    out: Tensor = denoiser(noise * sigma_init, sigma, class_ids)
    return out


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float [B, C, H, W] to uint8 [B, H, W, C], truncated as in EDM."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
