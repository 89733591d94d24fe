"""The critic's update: the fake score learns to denoise the student's images, the discriminator to tell them from data."""

from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import Tensor

from uni_instruct.train.monitoring.metrics import Metrics, Tally
from uni_instruct.train.monitoring.nonfinite import NonFiniteTracker, raise_if_diverged
from uni_instruct.train.objective.guidance import drop_classes, guided_critic
from uni_instruct.train.objective.objective import Objective
from uni_instruct.train.objective.terms import discriminator_loss
from uni_instruct.train.optimization.distributed import BatchShard
from uni_instruct.train.optimization.optimizer import OptimizerStep
from uni_instruct.train.stages.augment import Augmentation, AugmentPipe, augmented
from uni_instruct.train.stages.data_loader import DataLoader
from uni_instruct.train.stages.student import StudentBatch
from uni_instruct.train.stages.teacher import denoising_loss


@dataclass(frozen=True, kw_only=True)
class CriticUpdate:
    """One update of the critic, with what all updates share. batches is None if no phase of the recipe needs data.

    If any phase needs the discriminator, it is trained in every phase, so that it is ready when the ratio is first used.
    class_weights [num_classes] give each class of the data the share that it has among the student's images; None without
    classes.
    """

    fabric: Fabric
    optimizer_step: OptimizerStep
    shard: BatchShard
    batches: DataLoader | None
    class_weights: Tensor | None
    pipe: AugmentPipe | None
    sigma_data: float
    bad_limit: int

    def __call__(
        self,
        index: int,
        data_index: int,
        objective: Objective,
        student_batch: StudentBatch,
        rng: torch.Generator,
        log_details: bool,
    ) -> Metrics:
        """Take one step on the student's images and on batch number data_index of the data. Returns metrics for the log.

        index: the training step, for the learning rate. Without log_details the returned dict is empty.
        """
        # The previous step's student update froze the critic.
        self.optimizer_step.module.requires_grad_(True)
        draw = _RandomInputs.of(objective, student_batch, self.pipe, rng)
        nonfinite, tally = NonFiniteTracker(), Tally(self.fabric)
        for part in self.shard.micro_batches:
            losses, logits = self._losses(part, data_index, objective, student_batch, draw)
            nonfinite.add(losses, draw.sigma[part])
            self.optimizer_step.backward(_total(losses, objective) / len(student_batch.noise))
            if log_details:
                tally.add({f"{name}/loss": loss for name, loss in losses.items()} | _accuracy(*logits))
        norm = self.optimizer_step.step(index)
        raise_if_diverged(self.fabric, self.optimizer_step, self.bad_limit, nonfinite, index + 1)
        return tally.means() | {"critic/gradient_norm": norm} if log_details else {}

    def _losses(
        self, part: slice, data_index: int, objective: Objective, student_batch: StudentBatch, draw: "_RandomInputs"
    ) -> tuple[Metrics, tuple[Tensor | None, Tensor | None]]:
        """Losses per image [b]: the fake score's, and the discriminator's if there is data. Then the logits (real, fake)."""
        device, critic = self.fabric.device, self.optimizer_step.module
        sigma = draw.sigma[part].to(device)
        # Augmented like the data, so that augmentation does not give the student's images away to the discriminator.
        clean, labels = augmented(student_batch.detached(part), draw.augmentation, part)
        # x_s = x_0 + s eps, for the student's images here and for the data below, at the same levels s.
        noised = clean + sigma * draw.noise[part].to(device)
        output = guided_critic(
            critic,
            noised,
            sigma,
            draw.classes_of(part, device),
            labels,
            scale=objective.config.fake_training_guidance,
            discriminate=self.batches is not None,
        )
        assert output.denoised is not None
        losses = {"fake_score": denoising_loss(output.denoised, clean, sigma, self.sigma_data)}
        if self.batches is None:
            return losses, (None, None)
        assert output.logits is not None
        images, class_ids = self.batches(data_index, part, device)
        real, labels = augmented(images, draw.real_augmentation, part)
        noised = real + sigma * draw.real_noise[part].to(device)
        # A student without classes is compared with data without classes, even if the data has labels.
        seen_ids = class_ids if student_batch.class_ids is not None else None
        logits = critic(noised, sigma, seen_ids, labels, denoise=False).logits
        losses["discriminator"] = discriminator_loss(logits, output.logits, self._real_weight(seen_ids))
        return losses, (logits, output.logits)

    def _real_weight(self, class_ids: Tensor | None) -> Tensor | float:
        if class_ids is None or self.class_weights is None:
            return 1.0
        return self.class_weights.to(class_ids.device)[class_ids]


@dataclass(frozen=True)
class _RandomInputs:
    """Everything random in one update, for the whole global batch."""

    sigma: Tensor
    noise: Tensor
    real_noise: Tensor
    class_ids: Tensor | None
    augmentation: Augmentation | None
    real_augmentation: Augmentation | None

    @classmethod
    def of(
        cls, objective: Objective, student_batch: StudentBatch, pipe: AugmentPipe | None, rng: torch.Generator
    ) -> "_RandomInputs":
        shape, batch = student_batch.noise.shape, len(student_batch.noise)
        return cls(
            sigma=objective.critic_levels.draw(batch, rng),
            noise=torch.randn(shape, generator=rng),
            # Independent noise at the same levels: the density ratio compares two distributions at one noise level.
            real_noise=torch.randn(shape, generator=rng),
            class_ids=drop_classes(student_batch.class_ids, objective.config.label_dropout, rng),
            augmentation=pipe.draw(batch, rng) if pipe else None,
            real_augmentation=pipe.draw(batch, rng) if pipe else None,
        )

    def classes_of(self, part: slice, device: torch.device) -> Tensor | None:
        return None if self.class_ids is None else self.class_ids[part].to(device)


def _total(losses: Metrics, objective: Objective) -> Tensor:
    # loss = fake score's + discriminator_scale x discriminator's: one backward pass, because they share the encoder.
    total = losses["fake_score"].sum()
    return total + objective.config.discriminator_scale * losses["discriminator"].sum() if "discriminator" in losses else total


def _accuracy(real: Tensor | None, fake: Tensor | None) -> Metrics:
    if real is None or fake is None:
        return {}
    # The mean of the accuracies on real images and on the student's, per image: guessing gives 0.5.
    return {"discriminator/accuracy": ((real > 0).float() + (fake < 0).float()) / 2}
