"""The teacher's many-step sampler (EDM, Karras et al. 2022, algorithm 1: deterministic, second order)."""

import itertools
from typing import Protocol

import torch
from torch import Tensor

from uni_instruct.networks.denoiser import ClassLabels
from uni_instruct.networks.preconditioning import Preconditioning
from uni_instruct.schedule import SIGMA_MAX, SIGMA_MIN, sampling_sigmas
from uni_instruct.spec import TEACHER_STEPS


class SampledDenoiser(Protocol):
    """D(x; sigma) as the sampler calls it: a `Denoiser`, or its compiled form."""

    @property
    def preconditioning(self) -> Preconditioning:
        """The denoiser's preconditioning, which defines its range of noise levels."""
        ...

    def __call__(self, x: Tensor, sigma: Tensor, class_ids: ClassLabels | None) -> Tensor:
        """The expected clean images of x float32 [B, C, H, W] at noise levels sigma [B, 1, 1, 1]."""
        ...


@torch.no_grad()
def heun_sample(denoiser: SampledDenoiser, noise: Tensor, class_ids: ClassLabels | None, steps: int = TEACHER_STEPS) -> Tensor:
    """Images float32 [B, C, H, W] in about [-1, 1] from N(0, 1) noise, with 2 * steps - 1 network evaluations.

    From sigma to s: d = (x - D(x; sigma)) / sigma; the Euler step x' = x + (s - sigma) d; then Heun's correction
    x + (s - sigma) (d + (x' - D(x'; s)) / s) / 2, unless s = 0. The state x is float64, as in EDM.
    """
    sigmas = supported_sigmas(denoiser.preconditioning, steps)
    x = noise.double() * sigmas[0]

    def slope(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(x), 1, 1, 1), sigma, device=x.device)
        return (x - denoiser(x.float(), level, class_ids).double()) / sigma

    for sigma, next_sigma in itertools.pairwise(sigmas):
        direction = slope(x, sigma)
        euler = x + (next_sigma - sigma) * direction
        x = euler if next_sigma == 0 else x + (next_sigma - sigma) * (direction + slope(euler, next_sigma)) / 2
    return x.float()


def supported_sigmas(preconditioning: Preconditioning, steps: int) -> list[float]:
    """The sampler's noise levels, decreasing to 0: [steps + 1]. All but the 0 are in the network's range or table of levels."""
    low, high = max(SIGMA_MIN, preconditioning.sigma_min), min(SIGMA_MAX, preconditioning.sigma_max)
    sigmas = torch.from_numpy(sampling_sigmas(steps, low, high)[:-1])
    return [*preconditioning.round_sigma(sigmas).tolist(), 0.0]
