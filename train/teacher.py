"""The teacher: a denoiser trained with EDM's loss (Karras et al. 2022, arXiv 2206.00364, table 1)."""

from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from uni_instruct.networks.ddpmpp import EDMDenoiser
from uni_instruct.sampler import heun_sample
from uni_instruct.schedule import lognormal_sigma
from uni_instruct.train.config import TeacherConfig
from uni_instruct.train.ema import Ema
from uni_instruct.train.optimizing import RateSchedule, optimize
from uni_instruct.train.randomness import Batches


class TeacherStage:
    """One step of denoising a batch of data; state is the denoiser, its average and the optimizer."""

    name = "teacher"

    def __init__(self, denoiser: EDMDenoiser, batches: Batches, config: TeacherConfig, fabric: Fabric):
        self.config, self.batches, self.fabric = config, batches, fabric
        self.batch, self.evaluate_kimg = config.batch, config.evaluate_kimg
        self.total_steps = max(1, round(config.duration_kimg * 1000 / config.batch))
        self.rate = RateSchedule(
            peak=config.learning_rate,
            total_steps=self.total_steps,
            batch=config.batch,
            warmup_kimg=config.warmup_kimg,
            decay_kimg=config.decay_kimg,
        )
        self.ema = Ema(denoiser.to(fabric.device), config.ema_halflife_kimg)
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
        self.denoiser, self.optimizer = fabric.setup(denoiser, optimizer)

    def step(self, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Trains on batch number `index`; returns the loss."""
        images, class_ids = self.batches(index, self.fabric.device)
        sigma = lognormal_sigma(len(images), self.config.p_mean, self.config.p_std, generator).to(images)
        noised = images + sigma * torch.randn(images.shape, generator=generator).to(images)
        denoised = self.denoiser(noised, sigma, class_ids)
        loss = denoising_loss(denoised, images, sigma, self.denoiser.sigma_data).mean()
        optimize(self.fabric, self.optimizer, loss, self.rate.at(index))
        self.ema.update(self.denoiser.parameters(), self.batch, (index + 1) * self.batch / 1000)
        return {"teacher/loss": loss.detach()}

    def sample(self, latents: Tensor, class_ids: Tensor | None) -> Tensor:
        """Images of the averaged teacher with its Heun sampler."""
        return heun_sample(self.ema.module, latents, class_ids, self.config.steps)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step reads and changes."""
        return {
            "denoiser": self.denoiser.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.denoiser.load_state_dict(state["denoiser"])
        self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])


def denoising_loss(denoised: Tensor, clean: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """EDM's loss, lambda(sigma) |D(x; sigma) - clean|^2 averaged over pixels: [B]."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (weight * (denoised - clean) ** 2).mean(dim=(1, 2, 3))
