"""The reference engine: torch, as trained. It also runs teachers, with their many-step sampler."""

import numpy as np
import torch
from torch import Tensor

from uni_instruct.bundle import Bundle
from uni_instruct.engines.outputs import Outputs
from uni_instruct.engines.record import EngineId
from uni_instruct.networks.build import load_denoiser
from uni_instruct.networks.one_step import OneStep, to_uint8
from uni_instruct.sampler import heun_sample


class TorchEngine:
    """Runs a bundle's weights in fp32 on the GPU where there is one, else on the CPU."""

    id = EngineId("torch", "fp32")

    def __init__(self, bundle: Bundle):
        self.spec = bundle.spec
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._generator: OneStep | None = OneStep(load_denoiser(bundle), bundle.spec.sigma_init).to(self.device)

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        """Images uint8 [B, H, W, C] of N(0, 1) noise float32 [B, C, H, W]."""
        return to_uint8(self._images(noise, class_ids)).cpu().numpy()

    def outputs(self, noise: np.ndarray, class_ids: np.ndarray | None) -> Outputs:
        """The images, and before rounding: float32 [B, C, H, W] in about [-1, 1]."""
        images = self._images(noise, class_ids)
        return Outputs(to_uint8(images).cpu().numpy(), images.cpu().numpy())

    def close(self) -> None:
        """Frees the weights, once what runs in other threads is done."""
        self._generator = None

    @torch.inference_mode()
    def _images(self, noise: np.ndarray, class_ids: np.ndarray | None) -> Tensor:
        generator = self._generator
        assert generator is not None, "the engine was closed"
        z = torch.from_numpy(noise).to(self.device)
        labels = None if class_ids is None else torch.from_numpy(class_ids).to(self.device)
        if self.spec.steps > 1:
            return heun_sample(generator.denoiser, z, labels, self.spec.steps)
        images: Tensor = generator(z, labels)
        return images
