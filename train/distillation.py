"""Distillation: a one-step generator, started from the teacher, follows the gradient of an expanded divergence."""

import copy
from functools import partial
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from uni_instruct.divergence import find_divergence
from uni_instruct.networks.critic import Critic
from uni_instruct.networks.ddpmpp import EDMDenoiser
from uni_instruct.schedule import karras_density, karras_uniform_sigma
from uni_instruct.train.config import DistillationConfig
from uni_instruct.train.ema import Ema
from uni_instruct.train.objective import (
    DiffusedBatch,
    density_ratio,
    discriminator_loss,
    exact_weight,
    expanded_loss,
    sid_weight,
)
from uni_instruct.train.optimizing import RateSchedule, optimize
from uni_instruct.train.randomness import Batches
from uni_instruct.train.teacher import denoising_loss

Metrics = dict[str, Tensor]


class DistillationStage:
    """Critic updates and one generator update a step. State is generator, average, critic and optimizers.

    The critic (fake score, and discriminator where the divergence needs a ratio) is trained at the noise levels at which it is
    read, those of the generator's loss.
    """

    name = "generator"

    def __init__(self, teacher: EDMDenoiser, batches: Batches, config: DistillationConfig, fabric: Fabric):
        self.config, self.batches, self.fabric = config, batches, fabric
        self.batch, self.evaluate_kimg = config.batch, config.evaluate_kimg
        self.total_steps = max(1, round(config.duration_kimg * 1000 / config.batch))
        self.divergence = find_divergence(config.divergence)
        self.num_classes, self.image_shape = teacher.num_classes, teacher.image_shape

        rate = partial(RateSchedule, total_steps=self.total_steps, batch=config.batch, decay_kimg=config.decay_kimg)
        self.generator_rate = rate(peak=config.generator_learning_rate)
        self.critic_rate = rate(peak=config.critic_learning_rate)

        generator, fake_score = copy.deepcopy(teacher), copy.deepcopy(teacher)
        self.ema = Ema(generator.to(fabric.device), config.ema_halflife_kimg)
        critic = Critic(fake_score.train(), with_discriminator=self.divergence.needs_ratio)
        self.teacher = fabric.setup_module(teacher.eval().requires_grad_(False))
        betas = (config.beta1, config.beta2)
        self.generator, self.generator_optimizer = fabric.setup(
            generator.train(), torch.optim.Adam(generator.parameters(), lr=config.generator_learning_rate, betas=betas)
        )
        self.critic, self.critic_optimizer = fabric.setup(
            critic, torch.optim.Adam(critic.parameters(), lr=config.critic_learning_rate, betas=betas)
        )
        self.critic.mark_forward_method("logits")

    def step(self, index: int, generator: torch.Generator) -> Metrics:
        """Updates the critic on fresh samples, then the generator through the last of them once the warm-up is over."""
        warm = index * self.batch >= self.config.critic_warmup_kimg * 1000
        updates = self.config.critic_updates
        for update in range(updates):
            class_ids = self._random_classes(generator)
            with torch.set_grad_enabled(warm and update == updates - 1):
                clean = self.generate(self.generator, self._noise(generator), class_ids)
            metrics = self._update_critic(index, index * updates + update, clean.detach(), class_ids, generator)
        if warm:
            metrics |= self._update_generator(index, clean, class_ids, generator)
        return metrics

    def generate(self, network: Any, latents: Tensor, class_ids: Tensor | None) -> Tensor:
        """G(z) = D(sigma_init z; sigma_init)."""
        sigma = latents.new_full((len(latents), 1, 1, 1), self.config.sigma_init)
        images: Tensor = network(latents * self.config.sigma_init, sigma, class_ids)
        return images

    def sample(self, latents: Tensor, class_ids: Tensor | None) -> Tensor:
        """Images of the averaged generator."""
        with torch.no_grad():
            return self.generate(self.ema.module, latents, class_ids)

    def _update_critic(
        self, index: int, data_index: int, fake: Tensor, class_ids: Tensor | None, generator: torch.Generator
    ) -> Metrics:
        """Denoising of the student's samples, and real against fake at the same noise levels."""
        self.critic.requires_grad_(True)
        sigma = self._sigma(generator)
        noised = fake + sigma * self._noise(generator)
        denoised, fake_logits = self.critic(noised, sigma, class_ids)
        loss = denoising_loss(denoised, fake, sigma, self.teacher.sigma_data).mean()
        metrics = {"fake_score/loss": loss.detach()}
        if fake_logits is not None:
            images, real_classes = self.batches(data_index, self.fabric.device)
            real_logits = self.critic.logits(images + sigma * self._noise(generator), sigma, real_classes)
            discrimination = discriminator_loss(real_logits, fake_logits).mean()
            loss = loss + self.config.discriminator_scale * discrimination
            accuracy = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
            metrics |= {"discriminator/loss": discrimination.detach(), "discriminator/accuracy": accuracy}
        optimize(self.fabric, self.critic_optimizer, loss, self.critic_rate.at(index))
        return metrics

    def _update_generator(self, index: int, clean: Tensor, class_ids: Tensor | None, generator: torch.Generator) -> Metrics:
        """One step along the gradient of the expanded divergence."""
        self.critic.requires_grad_(False)
        sigma = self._sigma(generator)
        noised = clean + sigma * self._noise(generator)
        denoised, logits = self.critic(noised, sigma, class_ids)
        batch = DiffusedBatch(
            sigma=sigma, clean=clean, noised=noised, teacher=self.teacher(noised, sigma, class_ids), fake=denoised
        )
        ratio = clean.new_ones(len(clean)) if logits is None else density_ratio(logits, self.config.logit_clamp)
        loss = (expanded_loss(self.divergence, batch, ratio, self.config.alpha) * self._weight(batch)).mean()
        optimize(self.fabric, self.generator_optimizer, loss, self.generator_rate.at(index))
        self.ema.update(self.generator.parameters(), self.batch, self._generator_kimg(index))
        metrics = {
            "generator/loss": loss.detach(),
            "generator/score_distance": (batch.teacher - batch.fake).detach().square().mean().sqrt(),
        }
        if logits is not None:
            metrics["ratio/effective_sample_size"] = ratio.sum() ** 2 / (ratio**2).sum() / len(ratio)
        return metrics

    def _weight(self, batch: DiffusedBatch) -> Tensor:
        if self.config.weighting == "sid":
            return sid_weight(batch)
        return exact_weight(batch.sigma, karras_density(batch.sigma, self.config.tmin, self.config.tmax))

    def _generator_kimg(self, index: int) -> float:
        return (index + 1) * self.batch / 1000 - self.config.critic_warmup_kimg

    def _sigma(self, generator: torch.Generator) -> Tensor:
        config = self.config
        return self.fabric.to_device(karras_uniform_sigma(self.batch, config.tmin, config.tmax, generator))

    def _noise(self, generator: torch.Generator) -> Tensor:
        return self.fabric.to_device(torch.randn(self.batch, *self.image_shape, generator=generator))

    def _random_classes(self, generator: torch.Generator) -> Tensor | None:
        if not self.num_classes:
            return None
        return self.fabric.to_device(torch.randint(self.num_classes, (self.batch,), generator=generator))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step reads and changes; the teacher is fixed."""
        return {
            "generator": self.generator.state_dict(),
            "ema": self.ema.module.state_dict(),
            "critic": self.critic.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.generator.load_state_dict(state["generator"])
        self.ema.module.load_state_dict(state["ema"])
        self.critic.load_state_dict(state["critic"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
