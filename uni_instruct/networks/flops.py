"""Count FLOPs while torch runs. On the meta device this needs neither arithmetic nor memory."""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from uni_instruct.networks.autoencoder import build_decoder
from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.one_step import OneStep
from uni_instruct.spec import ModelSpec

# A network with more FLOPs an image counts as heavy: CIFAR-10's DDPM++ has 4e10, the shipped generators less than 1e9.
HEAVY_FLOPS = 1e10


def count_flops(work: Callable[[], object]) -> int:
    """The FLOPs of matrix products, convolutions and attention in `work`. A multiply-add counts as 2."""
    # Attention runs as plain matrix products, since the counter does not support the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def is_heavy(spec: ModelSpec) -> bool:
    """Whether a CPU needs seconds for a few images. The activations of such a network are many times as large as its images."""
    return flops_of_image(spec) > HEAVY_FLOPS


def flops_of_image(spec: ModelSpec) -> int:
    """The FLOPs of one image of a one-step generator, including its decoder's."""
    with torch.device("meta"), torch.inference_mode():
        decoder = None if spec.decoder is None else build_decoder(spec.decoder)
        # `to`, because a decoder creates its constants on the CPU even here.
        generator = OneStep(build_denoiser(spec), spec.sigma_init, decoder).to("meta").eval()
        class_ids = torch.zeros(1, dtype=torch.int64) if spec.num_classes else None
        return count_flops(lambda: generator(torch.zeros(1, *spec.noise_shape), class_ids))
