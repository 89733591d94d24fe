"""Distillation: a one-step student, initialised from the teacher, is trained on the objective."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from uni_instruct.networks.critic import Critic
from uni_instruct.networks.denoiser import ClassLabels, Denoiser
from uni_instruct.networks.one_step import one_step
from uni_instruct.train.config import DistillationConfig, Recipe
from uni_instruct.train.monitoring.metrics import Metrics
from uni_instruct.train.objective.objective import Objective
from uni_instruct.train.objective.pairs import Pairs
from uni_instruct.train.objective.ratio import DensityRatio
from uni_instruct.train.objective.reward import Reward
from uni_instruct.train.optimization.distributed import BatchShard, compiled_as_asked, with_memory_format
from uni_instruct.train.optimization.ema import Averages
from uni_instruct.train.optimization.optimizer import Clipping, OptimizerStep, RateSchedule, can_fuse
from uni_instruct.train.stages.augment import open_pipe
from uni_instruct.train.stages.critic_update import CriticUpdate
from uni_instruct.train.stages.data_loader import DataLoader
from uni_instruct.train.stages.student import StudentBatch
from uni_instruct.train.stages.student_update import StudentUpdate


@dataclass(frozen=True, kw_only=True)
class DistillationModels:
    """The networks of a distillation. All start as copies of the teacher, unless the student is given other weights."""

    teacher: Denoiser
    student: Denoiser
    critic: Critic

    @classmethod
    def from_teacher(cls, teacher: Denoiser, recipe: Recipe, start: Denoiser | None = None) -> "DistillationModels":
        """Build student and critic from the teacher. The critic has a discriminator if any phase of the recipe needs one.

        start: initial student, by default a copy of the teacher.
        """
        critic = Critic(copy.deepcopy(teacher), recipe.objective.discriminator if recipe.needs_discriminator else None)
        return cls(teacher=teacher, student=start or copy.deepcopy(teacher), critic=critic)


class DistillationStage:
    """Distillation step by step: each step updates the critic `critic_updates` times, then the student once.

    The state is student, averages, critic, both optimizers and the running ratio means. batches, reward and pairs are None if
    no phase of the recipe needs them.
    """

    name = "generator"

    def __init__(
        self,
        models: DistillationModels,
        recipe: Recipe,
        fabric: Fabric,
        batches: DataLoader | None,
        reward: Reward | None = None,
        pairs: Pairs | None = None,
    ):
        config = self.config = recipe.distillation
        self.recipe, self.fabric = recipe, fabric
        self.objective = Objective.of(recipe.objective, reward)
        self.schedule = [(phase.until_kimg, Objective.of(phase.objective, reward)) for phase in recipe.schedule]
        self.batch, self.total_steps, self.evaluate_kimg = config.batch, config.total_steps, config.evaluate_kimg
        self.num_classes, self.image_shape = models.teacher.num_classes, models.teacher.image_shape
        shard = BatchShard(fabric, config.batch, config.micro_batch)
        self._one_pass = len(shard.micro_batches) == 1
        # Before compilation: averages are copies of the student, and run too seldom to be worth compiling.
        self.averages = Averages(
            with_memory_format(models.student.to(fabric.device), recipe.loop),
            config.ema_halflife_kimg,
            config.ema_power_std,
            rampup_ratio=config.ema_rampup,
        )
        self.student = self._optimizer_step(models.student, "student")
        self.critic = self._optimizer_step(models.critic, "critic")
        self.ratio = DensityRatio(fabric, recipe.objective.ratio_bins)
        self.update_critic = self._critic_update(models, shard, batches)
        self.update_student = self._student_update(models, shard, pairs)

    def step(self, index: int, rng: torch.Generator, log_details: bool) -> Metrics:
        """Update the critic on new samples, then, after the warm-up, the student on the last of these samples.

        Returns metrics for the log; empty without log_details.
        """
        objective = self.objective_at(index)
        # The fake score starts as a copy of the teacher. It has to learn the student's score before the student can use it.
        warmed_up = index * self.batch >= self.config.critic_warmup_kimg * 1000
        updates = objective.config.critic_updates
        for update in range(updates):
            last = update == updates - 1
            # Only the last update's images are kept with their gradient, and only if the student is updated through them.
            student_batch = self._draw_students(rng, keep=warmed_up and last and self._one_pass)
            # Every update reads a new batch. Its number follows from the step, so a resumed run continues in the right place.
            data_index = index * updates + update
            metrics = self.update_critic(index, data_index, objective, student_batch, rng, log_details and last)
        if warmed_up:
            bad = self.student.bad
            metrics |= self.update_student(index, objective, student_batch, rng, log_details)
            if self.student.bad == bad:
                self.averages.update(self.student.module.parameters(), self.batch, self._student_kimg(index))
        return metrics

    def objective_at(self, index: int) -> Objective:
        """The objective of that step, from the recipe's schedule."""
        # Computed from the index, so that a resumed run need not store its phase.
        kimg = index * self.batch / 1000
        return next((objective for until_kimg, objective in self.schedule if kimg < until_kimg), self.objective)

    @property
    def skipped(self) -> int:
        """Number of updates skipped because their gradient was not finite, student's and critic's together."""
        return self.student.bad + self.critic.bad

    def sample(self, noise: Tensor, class_ids: ClassLabels | None) -> Tensor:
        """Images [B, C, H, W] of the averaged student, in one evaluation."""
        with torch.no_grad():
            return one_step(self.averages.primary.module, noise, class_ids, self.config.sigma_init)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step reads and changes. The teacher is fixed and not included."""
        return {
            "generator": self.student.state_dict(),
            "critic": self.critic.state_dict(),
            "averages": self.averages.state_dict(),
            "ratio": self.ratio.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.student.load_state_dict(state["generator"])
        self.critic.load_state_dict(state["critic"])
        self.averages.load_state_dict(state["averages"])
        self.ratio.load_state_dict(state["ratio"])

    def _optimizer_step(self, module: torch.nn.Module, name: str) -> OptimizerStep:
        config = self.config
        peak = config.generator_learning_rate if name == "student" else config.critic_learning_rate
        module = compiled_as_asked(module.train(), self.recipe.loop)
        groups = _critic_groups(module, config) if isinstance(module, Critic) else [{"params": list(module.parameters())}]
        betas, fused = (config.beta1, config.beta2), can_fuse(self.fabric.device)
        adam = torch.optim.Adam(groups, lr=peak, betas=betas, eps=config.adam_eps, fused=fused)
        return OptimizerStep(self.fabric, module, adam, RateSchedule.of(config, peak), _clipping(config, name))

    def _critic_update(self, models: DistillationModels, shard: BatchShard, batches: DataLoader | None) -> CriticUpdate:
        config = self.config
        return CriticUpdate(
            fabric=self.fabric,
            optimizer_step=self.critic,
            shard=shard,
            batches=batches,
            class_weights=_class_weights(batches, self.num_classes),
            pipe=open_pipe(config.augment, config.augment_mirror),
            sigma_data=models.teacher.sigma_data,
            bad_limit=self.recipe.loop.bad_steps_in_a_row,
        )

    def _student_update(self, models: DistillationModels, shard: BatchShard, pairs: Pairs | None) -> StudentUpdate:
        loop, teacher = self.recipe.loop, models.teacher.eval().requires_grad_(False)
        return StudentUpdate(
            fabric=self.fabric,
            optimizer_step=self.student,
            critic=self.critic,
            teacher=self.fabric.setup_module(compiled_as_asked(teacher, loop)),
            shard=shard,
            ratio=self.ratio,
            pairs=pairs,
            bad_limit=loop.bad_steps_in_a_row,
        )

    def _draw_students(self, rng: torch.Generator, keep: bool) -> StudentBatch:
        noise = torch.randn(self.batch, *self.image_shape, generator=rng)
        class_ids = torch.randint(self.num_classes, (self.batch,), generator=rng) if self.num_classes else None
        return StudentBatch(self.student.module, self.config.sigma_init, noise, class_ids, keep=keep, device=self.fabric.device)

    def _student_kimg(self, index: int) -> float:
        # The average's half-life is bounded by the images that the student has been trained on. The warm-up trains it on none.
        return (index + 1) * self.batch / 1000 - self.config.critic_warmup_kimg


def _critic_groups(critic: Critic, config: DistillationConfig) -> list[dict[str, Any]]:
    """Parameter groups of the critic: the fake score, and the discriminator with its own learning rate."""
    # All parameters outside the fake score: the discriminator's head, or a discriminator with its own encoder.
    rest = [parameter for name, parameter in critic.named_parameters() if not name.startswith("fake_score.")]
    scale = config.discriminator_learning_rate / config.critic_learning_rate if config.discriminator_learning_rate else 1.0
    groups: list[dict[str, Any]] = [{"params": list(critic.fake_score.parameters())}]
    return [*groups, {"params": rest, "rate_scale": scale}] if rest else groups


def _clipping(config: DistillationConfig, name: str) -> Clipping:
    if name == "student":
        return Clipping(norm=config.generator_clip_norm, value=config.generator_clip_value)
    return Clipping(norm=config.critic_clip_norm, value=config.critic_clip_value)


def _class_weights(batches: DataLoader | None, num_classes: int) -> Tensor | None:
    """The weight of a data image by class, [num_classes], that makes all classes count equally; None without classes."""
    if batches is None or not num_classes or batches.dataset.labels is None:
        return None
    # w_k = N / (K n_k): with these weights the data's classes are uniform, like the classes drawn for the student.
    counts = np.bincount(batches.dataset.labels, minlength=num_classes)
    return torch.from_numpy(counts.sum() / num_classes / np.maximum(counts, 1)).float()
