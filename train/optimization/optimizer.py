"""One optimizer step: the learning rate, gradients summed over processes, clipping, and skipping of non-finite gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from uni_instruct.train.config import StageConfig

# The decays of a recipe: the factor of the rate over the last decay_kimg, from 1 at x = 1 (start) to 0 at x = 0 (end).
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "sqrt": lambda x: x**0.5,
}


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """A learning rate: linear warm-up to `peak` over the first warmup_kimg, and decay to zero over the last decay_kimg."""

    peak: float
    total_steps: int
    batch: int
    warmup_kimg: float = 0.0
    decay_kimg: float = 0.0
    decay: str = "linear"

    @classmethod
    def of(cls, config: StageConfig, peak: float) -> "RateSchedule":
        """The schedule of a stage with that peak rate."""
        return cls(
            peak=peak,
            total_steps=config.total_steps,
            batch=config.batch,
            warmup_kimg=config.warmup_kimg,
            decay_kimg=config.decay_kimg,
            decay=config.decay,
        )

    def at(self, step: int) -> float:
        """The learning rate of a step in 0..total_steps-1."""
        # rate = peak * min(1, seen / warmup) * fall(min(1, left / decay)). seen counts this step and left does too, so that
        # the rate is above 0 in the first and in the last step.
        seen_kimg = (step + 1) * self.batch / 1000
        left_kimg = (self.total_steps - step) * self.batch / 1000
        rise = min(1.0, seen_kimg / self.warmup_kimg) if self.warmup_kimg else 1.0
        fall = DECAYS[self.decay](min(1.0, left_kimg / self.decay_kimg)) if self.decay_kimg else 1.0
        return self.peak * rise * fall


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """Bounds of a gradient: first of its norm, then of each value. 0 means no bound."""

    norm: float = 0.0
    value: float = 0.0


def can_fuse(device: torch.device) -> bool:
    """Whether torch's optimizers have a fused kernel, one for the whole step, on that device."""
    return device.type in ("cpu", "cuda")


class OptimizerStep:
    """A module with its optimizer. Gradients of all `backward` calls, in all processes, are summed for one step.

    A parameter group's rate_scale multiplies its learning rate. A step whose gradient is not finite leaves the module as it
    was and is counted: `bad` is the total, `bad_in_a_row` the number since the last good step. With precision 16-mixed the
    loss scaler then lowers its scale, and such steps are counted only once the scale is below 1.
    """

    def __init__(self, fabric: Fabric, module: nn.Module, optimizer: Any, rate: RateSchedule, clipping: Clipping):
        self.fabric, self.rate, self.clipping = fabric, rate, clipping
        self.module, self.optimizer = fabric.setup(module, optimizer)
        self.bad = self.bad_in_a_row = 0

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of this process's part of the loss, a sum over the global batch."""
        self.fabric.backward(loss)

    def step(self, index: int) -> Tensor:
        """Take step `index` at its learning rate. Returns the norm of the gradient before clipping, a scalar."""
        # Computed from the step's index rather than by a scheduler, which would have state to save.
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate.at(index) * group.get("rate_scale", 1.0)
        # Before clipping, because the bound is for the gradient of the global batch.
        self._sum_over_processes()
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=self.clipping.norm or math.inf, error_if_nonfinite=False
        )
        assert norm is not None
        # The norm is finite only if every gradient value is. Testing the norm synchronises with the GPU once.
        finite, scaler = bool(torch.isfinite(norm)), self._scaler()
        if finite and self.clipping.value:
            nn.utils.clip_grad_value_(self.module.parameters(), self.clipping.value)
        if finite or scaler is not None:  # a scaler skips the bad step itself, and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad()
        # A scaler overflows now and then while it searches for its scale. Below scale 1 the gradients themselves are at fault.
        if finite:
            self.bad_in_a_row = 0
        elif scaler is None or scaler.get_scale() < 1:
            self.bad, self.bad_in_a_row = self.bad + 1, self.bad_in_a_row + 1
        return norm.detach()

    @property
    def scales_loss(self) -> bool:
        """Whether a loss scaler multiplies the loss before `backward`. Gradients of single terms are then not measured."""
        return self._scaler() is not None

    def state_dict(self) -> dict[str, Any]:
        """Weights, the optimizer's moments, counts of bad steps, and the loss scaler's state if there is one."""
        scaler = self._scaler()
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bad": self.bad,
            "bad_in_a_row": self.bad_in_a_row,
            "scaler": {} if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, but keep this optimizer's own settings (rates, betas, eps)."""
        self.module.load_state_dict(state["module"])
        # The recipe's settings apply, not those saved with the state, because they may change when a run is resumed.
        given = [{name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, given, strict=True):
            group.update(settings)
        self.bad, self.bad_in_a_row = state["bad"], state["bad_in_a_row"]
        scaler = self._scaler()
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])

    def _scaler(self) -> Any:
        # Private, because Fabric has no public access to its scaler.
        return getattr(self.fabric._precision, "scaler", None)

    def _sum_over_processes(self) -> None:
        if self.fabric.world_size == 1:
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        # One all-reduce of all gradients instead of one per tensor.
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        total = self.fabric.all_reduce(flat, reduce_op="sum")
        assert isinstance(total, Tensor)
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
