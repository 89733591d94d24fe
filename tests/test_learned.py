"""Training as it runs, with a learned fake score and discriminator, drives the true divergence down.

The data are a two-dimensional Gaussian mixture and the networks are small; everything between them is `DistillationStage`. The
true divergence is known by quadrature: the generator's density, diffused a little, is the average of a normal density over
the images of a dense, even set of latents.
"""

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import toy
from lightning_fabric import Fabric
from torch import Tensor, nn

from uni_instruct.divergence import DIVERGENCES, Divergence
from uni_instruct.networks.critic import Criticism
from uni_instruct.schedule import edm_preconditioning
from uni_instruct.train.distillation import DistillationStage, Players
from uni_instruct.train.randomness import initial_weights, step_generator
from uni_instruct.train.recipe import parse_recipe
from uni_instruct.train.student import one_step

SIGMA_DATA = 0.5
# The level at which densities are compared: below every width of the data.
CLEAN_ENOUGH = 0.1
START_MEAN, START_STD = 0.3, 0.35


def data() -> toy.Mixture:
    """Three modes of unequal weight and width, three to four of their widths apart."""
    return toy.Mixture(
        torch.tensor([0.5, 0.3, 0.2]),
        torch.tensor([[-0.5, -0.4], [0.6, -0.2], [0.0, 0.6]]),
        torch.tensor([0.25, 0.2, 0.22]) ** 2,
    )


class Perceptron(nn.Module):
    """F(c_in x, log(sigma) / 4) on pairs of pixels: [B, 2, 1, 1] to [B, outputs]."""

    def __init__(self, outputs: int, width: int = 64):
        super().__init__()
        self.first, self.noise = nn.Linear(2, width), nn.Linear(8, width)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.last = nn.Linear(width, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.flatten(1)
        inner = edm_preconditioning(sigma, SIGMA_DATA).c_in * x.flatten(1)
        angles = sigma.log() * torch.tensor([0.25, 0.5, 1.0, 2.0])
        return self.last(self.rest(self.first(inner) + self.noise(torch.cat([angles.sin(), angles.cos()], dim=1))))


class Denoiser(nn.Module):
    """Called as EDMDenoiser is. Untrained, it is that of a Gaussian of standard deviation SIGMA_DATA."""

    image_shape, num_classes, sigma_data = (2, 1, 1), 0, SIGMA_DATA

    def __init__(self) -> None:
        super().__init__()
        self.model = Perceptron(outputs=2)

    def forward(
        self, x: Tensor, sigma: Tensor, class_ids: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        c = edm_preconditioning(sigma, SIGMA_DATA)
        return c.c_skip * x + c.c_out * toy.as_images(self.model(x, sigma))


class Generator(Denoiser):
    """Untrained, it makes a Gaussian of standard deviation START_STD of its noise."""

    def forward(
        self, x: Tensor, sigma: Tensor, class_ids: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        return START_MEAN + START_STD * x / sigma + toy.as_images(self.model(x, sigma))


class Teacher(nn.Module):
    """The data's own denoiser."""

    image_shape, num_classes, sigma_data = (2, 1, 1), 0, SIGMA_DATA

    def forward(
        self, x: Tensor, sigma: Tensor, class_ids: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        return toy.as_images(data().denoised(x.flatten(1), sigma.flatten()))


class Judge(nn.Module):
    """Called as Critic is; fake score and discriminator are networks of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.fake_score, self.head = Denoiser(), Perceptron(outputs=1)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_ids: Tensor | None,
        augment_labels: Tensor | None = None,
        *,
        denoise: bool = True,
        discriminate: bool = True,
    ) -> Criticism:
        denoised = self.fake_score(x, sigma) if denoise else None
        return Criticism(denoised, self.head(x, sigma).flatten() if discriminate else None)


@dataclass(frozen=True)
class Draws:
    """Called as Batches is: real data that depend on the step alone."""

    batch: int
    dataset = SimpleNamespace(labels=None)

    def __call__(self, step: int, part: slice, device: torch.device) -> tuple[Tensor, None]:
        return toy.as_images(data().sample(self.batch, step_generator(0, "data", step)))[part], None


def stage_of(
    objective: dict[str, Any], steps: int, batch: int, rates: tuple[float, float], seed: int = 0, **more: Any
) -> DistillationStage:
    recipe = parse_recipe(
        {
            "name": "mixture",
            "data": "drawn",
            "objective": objective,
            "distillation": {
                "duration_kimg": steps * batch / 1000,
                "batch": batch,
                "generator_learning_rate": rates[0],
                "critic_learning_rate": rates[1],
                "critic_warmup_kimg": 100 * batch / 1000,
                "decay_kimg": steps * batch / 2000,
                "ema_halflife_kimg": 40 * batch / 1000,
            }
            | more,
        }
    )
    generator, judge = initial_weights(Generator, seed), initial_weights(Judge, seed + 1000)
    players = Players(teacher=cast(Any, Teacher()), generator=cast(Any, generator), critic=cast(Any, judge))
    return DistillationStage(players, recipe, Fabric(accelerator="cpu", devices=1), cast(Any, Draws(batch)))


def true_divergence(divergence: Divergence, stage: DistillationStage, points: int = 8192) -> float:
    """D_f(q || p) of data and generator, both diffused to CLEAN_ENOUGH, on a grid."""
    uniform = torch.quasirandom.SobolEngine(2).draw(points + 1)[1:].clamp(1e-6, 1 - 1e-6)
    latents = toy.as_images(math.sqrt(2) * torch.erfinv(2 * uniform - 1))
    images = stage.sample(latents, None).flatten(1).double()
    axis = torch.arange(-2.2, 2.2, 0.04, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_p = torch.cat([_log_average(part, images) for part in grid.split(1024)])
    wide = toy.Mixture(*(getattr(data(), name).double() for name in ("weights", "means", "variances")))
    log_q = wide.log_density(grid, torch.tensor(CLEAN_ENOUGH, dtype=torch.float64))
    ratio = (log_q - log_p).clamp(-600, 600).exp()
    return float((log_p.exp() * divergence.f(ratio)).sum() * 0.04**2)


def _log_average(x: Tensor, centres: Tensor) -> Tensor:
    variance = CLEAN_ENOUGH**2
    square = torch.cdist(x, centres) ** 2
    return torch.logsumexp(-square / (2 * variance), dim=1) - math.log(len(centres) * 2 * math.pi * variance)
