"""The torch engine: runs the weights as trained, and is the reference for all others. Also teachers, 16 bits, compiled code."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from uni_instruct.bundle import Bundle
from uni_instruct.class_mixture import ClassIds
from uni_instruct.engines.compiled.torch_images import compiled_images
from uni_instruct.engines.hardware.device import CPU, CUDA, device_type
from uni_instruct.engines.hardware.threads import Threads
from uni_instruct.engines.outputs import Outputs
from uni_instruct.engines.record import COMPILED, EngineId
from uni_instruct.engines.sensitive_layers import sensitive_layers
from uni_instruct.errors import RequestError
from uni_instruct.networks.blocks import Conv2d
from uni_instruct.networks.cuda_graphs import CudaGraphRunner
from uni_instruct.networks.denoiser import ClassLabels
from uni_instruct.networks.float32 import full_float32
from uni_instruct.networks.one_step import OneStep, as_tensors, load_one_step, to_uint8
from uni_instruct.noise import Inputs, checked_inputs
from uni_instruct.sampler import heun_sample

# Precision -> the dtype of the large convolutions.
_SIXTEEN_BITS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """Runs a bundle's weights on the CPU, or on a GPU such as 'cuda:0'. On a GPU, one-step generators run as CUDA graphs.

    precision: 'fp32', without TF32; or 'bf16' or 'fp16' for the large convolutions. target: COMPILED for machine code that
    torch's inductor makes of the network, on the CPU only; '' for torch's own kernels, layer by layer.
    Raises RequestError for a teacher in 16 bits: rounding errors would add up over its many steps. Raises CompilationError if
    the compiler fails.
    """

    def __init__(self, bundle: Bundle, *, device: str = CPU, precision: str = "fp32", target: str = ""):
        self.spec, self.device, self._bundle = bundle.spec, device, bundle
        self.id, self.mixes_classes = EngineId("torch", precision, target), bool(bundle.spec.num_classes)
        Threads.here(spin=False).for_torch()
        self._make: Callable[[Tensor, ClassLabels | None], Tensor] | None = self._maker()

    def _maker(self) -> Callable[[Tensor, ClassLabels | None], Tensor]:
        """The function from noise and class ids to images [B, C, H, W]. Only this function holds the weights."""
        if self.id.target == COMPILED:
            return compiled_images(self._bundle, self.id)
        generator, steps = load_generator(self._bundle, self.id.precision).to(self.device), self.spec.steps
        if steps > 1:  # the noise level changes at every evaluation, so no CUDA graphs
            return lambda z, labels: generator.decode(heun_sample(generator.denoiser, z, labels, steps))
        return CudaGraphRunner(generator) if device_type(self.device) == CUDA else generator

    def __call__(self, noise: np.ndarray, class_ids: ClassIds | None) -> np.ndarray:
        """Images uint8 [B, H, W, C] of N(0, 1) noise float32 [B, *noise_shape]. Raises RequestError for latents."""
        self._bundle.check_makes_pictures()
        parts = checked_inputs(self.spec, noise, class_ids).parts(self.spec.max_decoder_batch)
        return np.concatenate([to_uint8(self._images(part)).cpu().numpy() for part in parts])

    def outputs(self, noise: np.ndarray, class_ids: ClassIds | None) -> Outputs:
        """The pixels, and the images before rounding: float32 [B, C, H, W] in about [-1, 1], or latents in their own range."""
        inputs = checked_inputs(self.spec, noise, class_ids)
        parts = [self._images(part) for part in inputs.parts(self.spec.max_decoder_batch)]
        # Latents have no pixels: images[:0] makes an empty array of the right shape.
        pixels = [to_uint8(images if self.spec.makes_pictures else images[:0]).cpu().numpy() for images in parts]
        return Outputs(np.concatenate(pixels), np.concatenate([images.cpu().numpy() for images in parts]))

    def close(self) -> None:
        """Frees the weights, as soon as calls in other threads have finished."""
        self._make = None

    @torch.inference_mode()
    def _images(self, inputs: Inputs) -> Tensor:
        make = self._make
        assert make is not None, "the engine was closed"
        # The other engines are compared with this one. Without this block, a GPU would round its convolutions to TF32.
        with full_float32():
            return make(*as_tensors(inputs, self.device))


def load_generator(bundle: Bundle, precision: str) -> OneStep:
    """Load the bundle's network and its decoder to the CPU, with the large convolutions in that precision.

    Raises RequestError for a teacher in 16 bits.
    """
    generator = load_one_step(bundle)
    if precision in _SIXTEEN_BITS:
        _round_convolutions(generator, bundle, _SIXTEEN_BITS[precision])
    return generator


def _round_convolutions(generator: OneStep, bundle: Bundle, dtype: torch.dtype) -> None:
    """Change the large convolutions, in place, to 16 bits and channels-last layout, for which CPUs and GPUs have fast kernels.

    Sums, normalisation and attention stay float32: in bf16 as well, the error is four times as large (docs/export.md, "bf16").
    """
    if bundle.spec.steps > 1:
        raise RequestError(
            f"a teacher of {bundle.spec.steps} steps runs in fp32 only", remedy="use --engine torch-fp32", param="engine"
        )
    found = [(name, module) for name, module in generator.denoiser.model.named_modules() if _has_filters(module)]
    shapes = [(f"{name}.weight", tuple(module.get_parameter("weight").shape)) for name, module in found]
    kept = sensitive_layers(shapes, bundle.spec)

    def rounded_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        image, *others = inputs
        return image.to(dtype, memory_format=torch.channels_last), *others

    for module in (module for i, (_, module) in enumerate(found) if i not in kept):
        module.register_forward_pre_hook(rounded_input)
        module.register_forward_hook(_wide_output)
        if isinstance(module, Conv2d) and module.weight is not None:  # EDM2's layers need float32 weights, to normalise them
            module.to(dtype)
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def _has_filters(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 4


def _wide_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.float()
