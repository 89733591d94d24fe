"""Exponential moving average of weights, with a half-life in images and EDM's ramp-up."""

import copy
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Averaged = TypeVar("Averaged", bound=nn.Module)

RAMPUP_RATIO = 0.05


class Ema(Generic[Averaged]):
    """The average of a module's weights; `module` is a copy that holds it."""

    def __init__(self, module: Averaged, halflife_kimg: float):
        self.module: Averaged = copy.deepcopy(module).eval().requires_grad_(False)
        self.halflife_kimg = halflife_kimg

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], batch: int, seen_kimg: float) -> None:
        """One step of `batch` images; early on the half-life is at most RAMPUP_RATIO of what was seen."""
        halflife = min(self.halflife_kimg, max(seen_kimg, 1e-3) * RAMPUP_RATIO) * 1000
        keep = 0.5 ** (batch / max(halflife, 1e-8))
        torch._foreach_lerp_(list(self.module.parameters()), list(parameters), 1 - keep)
