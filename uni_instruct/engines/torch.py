"""The reference engine: torch, as trained. It also runs teachers, with their many-step sampler."""

import numpy as np
import torch
from torch import Tensor

from uni_instruct.bundle import Bundle
from uni_instruct.networks.build import load_denoiser
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.sampler import heun_sample


class TorchEngine:
    """Runs a bundle's weights in fp32 on the GPU where there is one, else on the CPU."""

    name = "torch"

    def __init__(self, bundle: Bundle):
        self.spec = bundle.spec
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._denoiser = load_denoiser(bundle).to(self.device)

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        """Images uint8 [B, H, W, C] of N(0, 1) noise float32 [B, C, H, W]."""
        return to_uint8(self.denoised(noise, class_ids)).cpu().numpy()

    @torch.inference_mode()
    def denoised(self, noise: np.ndarray, class_ids: np.ndarray | None) -> Tensor:
        """The images before rounding: float32 [B, C, H, W] in about [-1, 1], on the engine's device."""
        z = torch.from_numpy(noise).to(self.device)
        labels = None if class_ids is None else torch.from_numpy(class_ids).to(self.device)
        if self.spec.steps > 1:
            return heun_sample(self._denoiser, z, labels, self.spec.steps)
        return one_step(self._denoiser, z, labels, self.spec.sigma_init)


def one_step(denoiser: Denoiser, noise: Tensor, class_ids: Tensor | None, sigma_init: float) -> Tensor:
    """G(z) = D(sigma_init z; sigma_init): float32 [B, C, H, W] in about [-1, 1]."""
    sigma = noise.new_full((len(noise), 1, 1, 1), sigma_init)
    out: Tensor = denoiser(noise * sigma_init, sigma, class_ids)
    return out


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] float [B, C, H, W] to uint8 [B, H, W, C], truncated as in EDM."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
