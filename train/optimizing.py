"""One optimizer step, at a learning rate that is a function of the step alone."""

from dataclasses import dataclass
from typing import Any

from lightning_fabric import Fabric
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """A peak rate, a linear rise over the first warmup_kimg and a linear fall to zero over the last decay_kimg."""

    peak: float
    total_steps: int
    batch: int
    warmup_kimg: float = 0.0
    decay_kimg: float = 0.0

    def at(self, step: int) -> float:
        """The learning rate of a step in 0..total_steps-1."""
        seen_kimg = (step + 1) * self.batch / 1000
        left_kimg = (self.total_steps - step) * self.batch / 1000
        rise = min(1.0, seen_kimg / self.warmup_kimg) if self.warmup_kimg else 1.0
        fall = min(1.0, left_kimg / self.decay_kimg) if self.decay_kimg else 1.0
        return self.peak * rise * fall


def optimize(fabric: Fabric, optimizer: Any, loss: Tensor, learning_rate: float) -> None:
    """Clears the gradients, back-propagates the scalar loss and steps."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.zero_grad()
    fabric.backward(loss)
    optimizer.step()
