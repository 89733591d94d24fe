"""The teacher: a denoiser trained with EDM's loss (Karras et al. 2022, arXiv 2206.00364, table 1)."""

from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from uni_instruct.networks.denoiser import ClassLabels, Denoiser
from uni_instruct.sampler import heun_sample
from uni_instruct.schedule import LogNormalLevels
from uni_instruct.train.config import Recipe
from uni_instruct.train.monitoring.metrics import Metrics, Tally
from uni_instruct.train.monitoring.nonfinite import NonFiniteTracker, raise_if_diverged
from uni_instruct.train.objective.guidance import drop_classes
from uni_instruct.train.optimization.distributed import BatchShard, compiled_as_asked, with_memory_format
from uni_instruct.train.optimization.ema import Averages
from uni_instruct.train.optimization.optimizer import Clipping, OptimizerStep, RateSchedule, can_fuse
from uni_instruct.train.stages.augment import augmented, open_pipe
from uni_instruct.train.stages.data_loader import DataLoader


class TeacherStage:
    """Training of the teacher step by step: each step denoises one batch of data.

    The state is the denoiser, its averages and the optimizer.
    """

    name = "teacher"

    def __init__(self, denoiser: Denoiser, batches: DataLoader, recipe: Recipe, fabric: Fabric):
        config = self.config = recipe.teacher
        self.batches, self.fabric, self.bad_limit = batches, fabric, recipe.loop.bad_steps_in_a_row
        self.batch, self.total_steps, self.evaluate_kimg = config.batch, config.total_steps, config.evaluate_kimg
        self.shard = BatchShard(fabric, config.batch, config.micro_batch)
        self.levels = LogNormalLevels(config.p_mean, config.p_std)
        self.sigma_data, self.image_shape, self.conditional = (
            denoiser.sigma_data,
            denoiser.image_shape,
            denoiser.num_classes > 0,
        )
        self.pipe = open_pipe(config.augment, config.augment_mirror)
        # Before compilation: averages are copies of the denoiser, and run too seldom to be worth compiling.
        self.averages = Averages(
            with_memory_format(denoiser.to(fabric.device), recipe.loop),
            config.ema_halflife_kimg,
            config.ema_power_std,
            rampup_ratio=config.ema_rampup,
        )
        denoiser = compiled_as_asked(denoiser, recipe.loop)
        adam = torch.optim.Adam(
            denoiser.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), fused=can_fuse(fabric.device)
        )
        self.optimizer_step = OptimizerStep(
            fabric, denoiser, adam, RateSchedule.of(config, config.learning_rate), Clipping(norm=config.clip_norm)
        )

    def step(self, index: int, rng: torch.Generator, log_details: bool) -> Metrics:
        """Train on batch number `index`. Returns loss and gradient norm with log_details, else an empty dict."""
        device, shape = self.fabric.device, (self.batch, *self.image_shape)
        # All random numbers are drawn for the global batch and then divided, so that micro-batches and processes do not
        # change them.
        sigmas, noise = self.levels.draw(self.batch, rng), torch.randn(shape, generator=rng)
        augmentation = self.pipe.draw(self.batch, rng) if self.pipe else None
        hidden = drop_classes(torch.zeros(self.batch, dtype=torch.int64), self.config.label_dropout, rng)
        nonfinite, tally = NonFiniteTracker(), Tally(self.fabric)
        for part in self.shard.micro_batches:
            images, class_ids = self.batches(index, part, device)
            sigma = sigmas[part].to(device)
            # `hidden` is drawn before the class ids are read, which come with each part. -1 marks the classes to hide.
            if class_ids is not None and hidden is not None:
                class_ids = torch.where(hidden[part].to(device) < 0, hidden[part].to(device), class_ids)
            clean, labels = augmented(images, augmentation, part)
            denoised = self.optimizer_step.module(clean + sigma * noise[part].to(device), sigma, class_ids, labels)
            losses = {"teacher": denoising_loss(denoised, clean, sigma, self.sigma_data)}
            nonfinite.add(losses, sigma)
            if log_details:
                tally.add({"teacher/loss": losses["teacher"]})
            # Summed over parts and processes, this gives the gradient of the mean over the global batch.
            self.optimizer_step.backward(losses["teacher"].sum() / self.batch)
        bad = self.optimizer_step.bad
        norm = self.optimizer_step.step(index)
        raise_if_diverged(self.fabric, self.optimizer_step, self.bad_limit, nonfinite, index + 1)
        # A skipped step changed no weights, so the averages must not be updated either.
        if self.optimizer_step.bad == bad:
            self.averages.update(self.optimizer_step.module.parameters(), self.batch, (index + 1) * self.batch / 1000)
        return tally.means() | {"teacher/gradient_norm": norm} if log_details else {}

    @property
    def skipped(self) -> int:
        """Number of updates skipped because their gradient was not finite."""
        return self.optimizer_step.bad

    def sample(self, noise: Tensor, class_ids: ClassLabels | None) -> Tensor:
        """Images [B, C, H, W] of the averaged teacher, sampled with Heun's method in the recipe's number of steps."""
        return heun_sample(self.averages.primary.module, noise, class_ids, self.config.steps)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step reads and changes."""
        return {"denoiser": self.optimizer_step.state_dict(), "averages": self.averages.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.optimizer_step.load_state_dict(state["denoiser"])
        self.averages.load_state_dict(state["averages"])


def denoising_loss(denoised: Tensor, clean: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss, lambda(sigma) |D(x; sigma) - clean|^2 averaged over pixels: [B]."""
    # lambda(s) = (s^2 + sigma_data^2) / (s sigma_data)^2 = 1 / c_out^2, which makes all noise levels count alike (EDM, section
    # 5).
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (weight * (denoised - clean) ** 2).mean(dim=(1, 2, 3))
