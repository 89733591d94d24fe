"""Which term of an update was not finite, and what to change in the recipe."""

from collections.abc import Mapping

import torch
from lightning_fabric import Fabric
from torch import Tensor

from uni_instruct.errors import UniInstructError
from uni_instruct.train.optimization.optimizer import OptimizerStep

ADVICE = {
    "generator": "lower distillation.generator_learning_rate",
    "di": "raise objective.tmin or lower objective.logit_clamp",
    "fgm": "raise objective.tmin or lower distillation.generator_learning_rate",
    "sim": "raise objective.tmin or lower distillation.generator_learning_rate",
    "integral": "raise objective.tmin or lower distillation.generator_learning_rate",
    "adversarial": "lower objective.adversarial_scale or distillation.critic_learning_rate",
    "regression": "lower objective.regression_scale or distillation.generator_learning_rate",
    "reward": "make the reward finite for every image, or lower objective.reward_scale",
    "fake_score": "lower distillation.critic_learning_rate",
    "discriminator": "lower objective.discriminator_scale or distillation.critic_learning_rate",
    "teacher": "lower teacher.learning_rate or lengthen teacher.warmup_kimg",
    "gradient": "clip the gradient (distillation.generator_clip_norm, distillation.critic_clip_norm, teacher.clip_norm) "
    "or lower the learning rates",
}


class TrainingError(UniInstructError):
    """Training diverged and cannot continue."""


class NonFiniteTracker:
    """Keeps the per-image terms of one update, so that the first one that is not finite can be found afterwards."""

    def __init__(self) -> None:
        self._terms: list[tuple[str, Tensor, Tensor]] = []

    def add(self, terms: Mapping[str, Tensor], sigma: Tensor) -> None:
        """Keep the terms of one micro-batch: name -> [b], at noise levels sigma [b, 1, 1, 1]."""
        # Examined only after a bad gradient, because testing each term would synchronise with the GPU in every step.
        self._terms += [(name, values.detach(), sigma.detach().flatten()) for name, values in terms.items()]

    def first_bad(self) -> tuple[str, float] | None:
        """The first term that is not finite, and the noise level of its first bad image; None if all are finite."""
        for name, values, sigma in self._terms:
            bad = ~torch.isfinite(values)
            if bad.any():
                return name, float(sigma[bad][0])
        return None


def raise_if_diverged(
    fabric: Fabric, optimizer_step: OptimizerStep, limit: int, nonfinite: NonFiniteTracker, step: int
) -> None:
    """Raise TrainingError after `limit` updates in a row that were not finite, naming step, term and noise level."""
    if optimizer_step.bad_in_a_row < limit:
        return
    # The bad term may be in another process's shard, and all processes must raise the same error.
    found = fabric.all_gather(_encode(nonfinite.first_bad(), fabric.device))
    assert isinstance(found, Tensor)
    named = [row for row in found.reshape(-1, 2).tolist() if row[0] >= 0]
    names = list(ADVICE)
    term, where = (names[int(named[0][0])], f" at noise level {named[0][1]:.4g}") if named else ("gradient", "")
    raise TrainingError(
        f"{term} is NaN or infinite{where} in {limit} updates in a row, the last in step {step}",
        remedy=f"{ADVICE[term]}, and run again to resume from the last state",
    )


def _encode(bad: tuple[str, float] | None, device: torch.device) -> Tensor:
    # Processes exchange tensors, so a term is sent as its index in ADVICE.
    return torch.tensor([-1.0, 0.0] if bad is None else [list(ADVICE).index(bad[0]), bad[1]], device=device)
