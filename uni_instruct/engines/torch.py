"""The reference engine: torch, as trained. It also runs teachers, with their many-step sampler."""

import numpy as np
import torch
from torch import Tensor

from uni_instruct.bundle import Bundle
from uni_instruct.engines.device import CPU, CUDA, kind_of
from uni_instruct.engines.outputs import Outputs
from uni_instruct.engines.record import EngineId
from uni_instruct.engines.threads import Threads
from uni_instruct.float32 import full_float32
from uni_instruct.networks.cuda_graphs import CapturedBatches
from uni_instruct.networks.one_step import OneStep, as_tensors, load_one_step, to_uint8
from uni_instruct.noise import Inputs, checked_inputs
from uni_instruct.sampler import heun_sample

# Precision -> what autocast multiplies in.
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """Runs a bundle's weights on the CPU or a GPU ('cuda:0'), there through CUDA graphs.

    precision: 'fp32', without TF32, or what the network's products are computed in, 'bf16' or 'fp16' (autocast).
    """

    def __init__(self, bundle: Bundle, *, device: str = CPU, precision: str = "fp32"):
        self.spec, self.device, self._bundle = bundle.spec, device, bundle
        self.id = EngineId("torch", precision)
        Threads.here(spin=False).for_torch()
        self._generator: OneStep | None = load_one_step(bundle).to(self.device)
        # A teacher's sampler is many evaluations, each of other noise levels.
        captures = kind_of(device) == CUDA and bundle.spec.steps == 1
        self._one_step = CapturedBatches(self._generate) if captures else self._generate

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        """Images uint8 [B, H, W, C] of N(0, 1) noise float32 [B, *noise_shape]. Raises RequestError for latents."""
        self._bundle.check_makes_pictures()
        parts = checked_inputs(self.spec, noise, class_ids).parts(self.spec.images_at_once)
        return np.concatenate([to_uint8(self._images(part)).cpu().numpy() for part in parts])

    def outputs(self, noise: np.ndarray, class_ids: np.ndarray | None) -> Outputs:
        """The images, and before rounding: float32 [B, C, H, W] in about [-1, 1]; latents as they are."""
        inputs = checked_inputs(self.spec, noise, class_ids)
        parts = [self._images(part) for part in inputs.parts(self.spec.images_at_once)]
        pixels = [to_uint8(images if self.spec.makes_pictures else images[:0]).cpu().numpy() for images in parts]
        return Outputs(np.concatenate(pixels), np.concatenate([images.cpu().numpy() for images in parts]))

    def close(self) -> None:
        """Frees the weights, once what runs in other threads is done."""
        self._generator, self._one_step = None, self._generate

    @torch.inference_mode()
    def _images(self, inputs: Inputs) -> Tensor:
        assert self._generator is not None, "the engine was closed"
        # This engine is what the others are held against: on a GPU its convolutions would take TF32 otherwise.
        with full_float32():
            return self._one_step(*as_tensors(inputs, self.device))

    def _generate(self, z: Tensor, labels: Tensor | None) -> Tensor:
        generator = self._generator
        assert generator is not None, "the engine was closed"
        # Without its cache: a graph would hold rounded weights that are freed when the block ends.
        with torch.autocast(kind_of(self.device), _AUTOCAST.get(self.id.precision), self.id.precision != "fp32", False):
            if self.spec.steps > 1:
                return generator.decode(heun_sample(generator.denoiser, z, labels, self.spec.steps))
            images: Tensor = generator(z, labels)
            return images.float()
