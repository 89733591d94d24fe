"""One optimizer step: rates that depend on the step alone, gradients summed over processes, nothing that is not finite."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from uni_instruct.train.config import StageConfig

# The decays of a recipe: how the rate falls over the last decay_kimg, from 1 at x = 1 (they begin) to x = 0 (the end).
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    "sqrt": lambda x: x**0.5,
}


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """A peak rate, a linear rise over the first warmup_kimg and a fall to zero over the last decay_kimg."""

    peak: float
    total_steps: int
    batch: int
    warmup_kimg: float = 0.0
    decay_kimg: float = 0.0
    decay: str = "linear"

    @classmethod
    def of(cls, config: StageConfig, peak: float) -> "RateSchedule":
        """The rate over a stage's steps, from its highest."""
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
        # rate = peak * min(1, seen / warmup) * fall(min(1, left / decay)); step + 1, so that the first step moves something and
        # the last one, with something left, still does.
        seen_kimg = (step + 1) * self.batch / 1000
        left_kimg = (self.total_steps - step) * self.batch / 1000
        rise = min(1.0, seen_kimg / self.warmup_kimg) if self.warmup_kimg else 1.0
        fall = DECAYS[self.decay](min(1.0, left_kimg / self.decay_kimg)) if self.decay_kimg else 1.0
        return self.peak * rise * fall


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """Bounds of a gradient: of its norm, then of each value; 0 is none."""

    norm: float = 0.0
    value: float = 0.0


def can_fuse(device: torch.device) -> bool:
    """Whether torch's optimizers have one kernel for all of a step on that device."""
    return device.type in ("cpu", "cuda")


class OptimizerStep:
    """A module's optimizer. Gradients of any number of `backward` calls, in all processes, add up to those of one step.

    A parameter group's rate_scale multiplies its rate. A step whose gradient is not finite leaves the module as it was and is
    counted: `bad` in all, `bad_in_a_row` since the last good one. With precision 16-mixed the loss scaler lowers its scale
    instead, and only steps at the lowest scale count.
    """

    def __init__(self, fabric: Fabric, module: nn.Module, optimizer: Any, rate: RateSchedule, clipping: Clipping):
        self.fabric, self.rate, self.clipping = fabric, rate, clipping
        self.module, self.optimizer = fabric.setup(module, optimizer)
        self.bad = self.bad_in_a_row = 0

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this process's part of a sum over the global batch."""
        self.fabric.backward(loss)

    def step(self, index: int) -> Tensor:
        """Takes the step at the rate of `index`; returns the norm of its gradient before clipping, a scalar."""
        # Set anew from the step's index, and not by a scheduler: there is no state of it to save.
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate.at(index) * group.get("rate_scale", 1.0)
        # Before clipping: the bound is meant for the gradient of the whole batch.
        self._sum_over_processes()
        norm = self.fabric.clip_gradients(
            self.module, self.optimizer, max_norm=self.clipping.norm or math.inf, error_if_nonfinite=False
        )
        assert norm is not None
        # The norm of all gradients is finite only where every value is, and asks the GPU once.
        finite, scaler = bool(torch.isfinite(norm)), self._scaler()
        if finite and self.clipping.value:
            nn.utils.clip_grad_value_(self.module.parameters(), self.clipping.value)
        if finite or scaler is not None:  # a scaler leaves out the bad step itself, and learns from it
            self.optimizer.step()
        self.optimizer.zero_grad()
        # A scaler overflows now and then while it looks for its scale; below 1 it has nowhere left to go.
        if finite:
            self.bad_in_a_row = 0
        elif scaler is None or scaler.get_scale() < 1:
            self.bad, self.bad_in_a_row = self.bad + 1, self.bad_in_a_row + 1
        return norm.detach()

    @property
    def scales_loss(self) -> bool:
        """Whether a loss scaler stands between losses and gradients, which then are no gradients of single terms."""
        return self._scaler() is not None

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, counts, and the loss scale where there is one."""
        scaler = self._scaler()
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "bad": self.bad,
            "bad_in_a_row": self.bad_in_a_row,
            "scaler": {} if scaler is None else scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.module.load_state_dict(state["module"])
        # The recipe's rates and moments hold, not those that the state was saved with: they may change when a run goes on.
        given = [{name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, given, strict=True):
            group.update(settings)
        self.bad, self.bad_in_a_row = state["bad"], state["bad_in_a_row"]
        scaler = self._scaler()
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])

    def _scaler(self) -> Any:
        # Fabric has no public way to it.
        return getattr(self.fabric._precision, "scaler", None)

    def _sum_over_processes(self) -> None:
        if self.fabric.world_size == 1:
            return
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        # One sum over processes instead of one for every tensor.
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        total = self.fabric.all_reduce(flat, reduce_op="sum")
        assert isinstance(total, Tensor)
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
