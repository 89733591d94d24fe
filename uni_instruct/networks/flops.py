"""FLOPs, counted while torch runs; on the meta device that needs neither arithmetic nor memory."""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from uni_instruct.networks.autoencoder import build_decoder
from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.one_step import OneStep
from uni_instruct.spec import ModelSpec

# FLOPs of an image of a large network: CIFAR-10's DDPM++ has 4e10, those that ship less than 1e9.
HEAVY_FLOPS = 1e10


def count_flops(work: Callable[[], object]) -> int:
    """FLOPs of matrix products, convolutions and attention; a multiplication with its addition counts as 2."""
    # Attention as plain products: the counter knows no other kind on the CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def is_heavy(spec: ModelSpec) -> bool:
    """Whether few images are a CPU's work of seconds, and what lies between their layers many times their size."""
    return flops_of_image(spec) > HEAVY_FLOPS


def flops_of_image(spec: ModelSpec) -> int:
    """FLOPs of one image of a one-step generator, its decoder's among them."""
    with torch.device("meta"), torch.inference_mode():
        decoder = None if spec.decoder is None else build_decoder(spec.decoder)
        # `to`, as a decoder keeps its constants where they have values.
        generator = OneStep(build_denoiser(spec), spec.sigma_init, decoder).to("meta").eval()
        class_ids = torch.zeros(1, dtype=torch.int64) if spec.num_classes else None
        return count_flops(lambda: generator(torch.zeros(1, *spec.noise_shape), class_ids))
