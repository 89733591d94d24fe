"""Training as it runs, with a learned fake score and discriminator, drives the true divergence down.

The data are a two-dimensional Gaussian mixture and the networks are small; everything between them is `DistillationStage`. The
true divergence is known by quadrature: the generator's density, diffused a little, is the weighted average of a normal
density over the images of a grid of noise.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from builders import toy
from uni_instruct.networks.critic import CriticOutput
from uni_instruct.networks.preconditioning import EDM
from uni_instruct.train.objective.divergences.table import DIVERGENCES, Divergence
from uni_instruct.train.recipe import parse_recipe
from uni_instruct.train.rng import initial_weights, step_rng
from uni_instruct.train.stages.distillation import DistillationModels, DistillationStage

SIGMA_DATA = 0.5
# The untrained generator's Gaussian, in each pixel: beside the data, and too narrow for them.
START_MEAN, START_STD = 0.3, 0.35
BATCH = 512
# The level at which densities are compared, half of the narrowest width of the data, and the cells of the grid.
CLEAN_ENOUGH, CELL = 0.1, 0.04


def test_forward_kl_falls_below_a_quarter_soon() -> None:
    assert_divergence_falls("forward-kl", steps=250, to=1 / 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divergence", "steps"), [("forward-kl", 1200), ("jeffreys", 2000), ("reverse-kl", 2000), ("jensen-shannon", 2000)]
)
def test_divergence_falls_below_a_twentieth(divergence: str, steps: int) -> None:
    assert_divergence_falls(divergence, steps, to=1 / 20)


def test_true_divergence_of_a_gaussian_generator_is_that_of_closed_forms() -> None:
    """The forward KL, which leans hardest on the tails."""
    forward_kl = DIVERGENCES["forward-kl"]
    untrained = toy.Mixture(torch.ones(1), torch.full((1, 2), START_MEAN), torch.tensor([START_STD**2]))
    grid, sigma = square_grid(reach=2.2, step=CELL), torch.tensor(CLEAN_ENOUGH)
    log_p, log_q = untrained.log_density(grid, sigma), data().log_density(grid, sigma)
    closed = (log_p.exp() * forward_kl.f((log_q - log_p).exp())).sum() * CELL**2
    assert true_divergence(forward_kl, stage_of("forward-kl", steps=1)) == pytest.approx(float(closed), rel=1e-3)


def assert_divergence_falls(name: str, steps: int, to: float) -> None:
    stage = stage_of(name, steps)
    before = true_divergence(DIVERGENCES[name], stage)
    for index in range(stage.total_steps):
        stage.step(index, step_rng(0, "generator", index), log_details=False)
    after = true_divergence(DIVERGENCES[name], stage)
    assert after < before * to, f"{before:.4f} fell to {after:.4f}"


def stage_of(divergence: str, steps: int) -> DistillationStage:
    kimg = BATCH / 1000
    recipe = parse_recipe(
        {
            "name": "mixture",
            "data": "drawn",
            "objective": {
                "divergence": divergence,
                "alpha": 0.5,
                "exact_sim": True,
                "adversarial_scale": 0,
                "weighting": "uniform",
                "noise": "lognormal",
                "discriminator_scale": 1,
            },
            "distillation": {
                "duration_kimg": steps * kimg,
                "batch": BATCH,
                "generator_learning_rate": 1e-3,
                "critic_learning_rate": 3e-3,
                "beta1": 0.5,
                "beta2": 0.99,
                "critic_warmup_kimg": min(100, steps // 2) * kimg,
                "decay_kimg": steps * kimg / 2,
                "ema_halflife_kimg": 40 * kimg,
            },
        }
    )
    generator, judge = initial_weights(Generator, seed=0), initial_weights(Judge, seed=1)
    models = DistillationModels(teacher=cast(Any, Teacher()), student=cast(Any, generator), critic=cast(Any, judge))
    return DistillationStage(models, recipe, Fabric(accelerator="cpu", devices=1), cast(Any, Draws(BATCH)))


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
        inner = EDM(sigma_data=SIGMA_DATA)(sigma).c_in * x.flatten(1)
        angles = sigma.log() * torch.tensor([0.25, 0.5, 1.0, 2.0])
        return self.last(self.rest(self.first(inner) + self.noise(torch.cat([angles.sin(), angles.cos()], dim=1))))


class PerceptronDenoiser(nn.Module):
    """Called as Denoiser is. Untrained, it is that of a Gaussian of standard deviation SIGMA_DATA."""

    image_shape, num_classes, sigma_data = (2, 1, 1), 0, SIGMA_DATA

    def __init__(self) -> None:
        super().__init__()
        self.model = Perceptron(outputs=2)

    def forward(
        self, x: Tensor, sigma: Tensor, class_ids: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        c = EDM(sigma_data=SIGMA_DATA)(sigma)
        return c.c_skip * x + c.c_out * toy.as_images(self.model(x, sigma))


class Generator(PerceptronDenoiser):
    """Untrained, it makes a Gaussian of its noise."""

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
        self.fake_score, self.head = PerceptronDenoiser(), Perceptron(outputs=1)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_ids: Tensor | None,
        augment_labels: Tensor | None = None,
        *,
        denoise: bool = True,
        discriminate: bool = True,
    ) -> CriticOutput:
        denoised = self.fake_score(x, sigma) if denoise else None
        return CriticOutput(denoised, self.head(x, sigma).flatten() if discriminate else None)


@dataclass(frozen=True)
class Draws:
    """Called as a DataLoader is: real data that depend on the step alone."""

    batch: int
    dataset = SimpleNamespace(labels=None)

    def __call__(self, step: int, part: slice, device: torch.device) -> tuple[Tensor, None]:
        return toy.as_images(data().sample(self.batch, step_rng(0, "data", step)))[part], None


def true_divergence(divergence: Divergence, stage: DistillationStage) -> float:
    """D_f(q || p) of data and averaged generator, both diffused to CLEAN_ENOUGH, on a grid."""
    # Latents on a grid with their weights, not drawn: the forward KL sees tails that no set of thousands of draws reaches.
    noise = square_grid(reach=5, step=0.08)
    log_weights = -(noise**2).sum(1) / 2
    images = stage.sample(toy.as_images(noise.float()), None).flatten(1).double()
    grid = square_grid(reach=2.2, step=CELL)
    log_p = torch.cat([log_average(part, images, log_weights) for part in grid.split(512)])
    log_q = data().log_density(grid, torch.tensor(CLEAN_ENOUGH))
    ratio = (log_q - log_p).clamp(-600, 600).exp()
    return float((log_p.exp() * divergence.f(ratio)).sum() * CELL**2)


def log_average(x: Tensor, centres: Tensor, log_weights: Tensor) -> Tensor:
    """log of the weighted average of N(x; centre, CLEAN_ENOUGH^2 I) over the centres: [N, 2], [M, 2] and [M] to [N]."""
    variance = CLEAN_ENOUGH**2
    log_terms = log_weights - torch.cdist(x, centres) ** 2 / (2 * variance)
    return torch.logsumexp(log_terms, dim=1) - torch.logsumexp(log_weights, dim=0) - math.log(2 * math.pi * variance)


def square_grid(reach: float, step: float) -> Tensor:
    """Points of a square about zero: [N, 2]."""
    axis = torch.arange(-reach, reach + step / 2, step, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis)
