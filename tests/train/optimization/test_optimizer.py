"""Learning rates in closed form, and what is clipped."""

import math

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from uni_instruct.train.optimization.optimizer import DECAYS, Clipping, OptimizerStep, RateSchedule


@pytest.mark.parametrize("decay", DECAYS)
def test_rate_rises_stays_and_falls(decay: str) -> None:
    rate = RateSchedule(peak=0.5, total_steps=100, batch=100, warmup_kimg=1, decay_kimg=2, decay=decay)
    assert [rate.at(step) for step in (0, 4, 9, 50, 80)] == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.5])
    half_left = {"linear": 0.5, "cosine": 0.5, "sqrt": math.sqrt(0.5)}[decay]
    assert rate.at(90) == pytest.approx(0.5 * half_left)
    falling = [rate.at(step) for step in range(80, 100)]
    assert falling == sorted(falling, reverse=True)
    assert 0 < falling[-1] < 0.12


def test_rate_without_warm_up_and_decay_is_constant() -> None:
    rate = RateSchedule(peak=0.5, total_steps=3, batch=100)
    assert [rate.at(step) for step in range(3)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("clipping", "moved"),
    [
        (Clipping(), [3.0, -4.0]),
        (Clipping(norm=10.0), [3.0, -4.0]),
        (Clipping(norm=1.0), [0.6, -0.8]),
        (Clipping(value=3.5), [3.0, -3.5]),
        (Clipping(norm=2.5, value=1.9), [1.5, -1.9]),
    ],
)
def test_gradient_is_clipped_and_its_norm_told_before(clipping: Clipping, moved: list[float]) -> None:
    optimization = sgd(clipping)
    weight = optimization.module.weight
    for part in range(2):  # two micro-batches add up
        optimization.backward((torch.tensor([3.0, -4.0]) * weight).sum() / 2 + 0 * part)
    assert optimization.step(0).item() == pytest.approx(5)
    assert (-weight.detach()).flatten().tolist() == pytest.approx(moved, rel=1e-5)


def test_a_groups_scale_multiplies_its_rate() -> None:
    optimization = sgd(Clipping(), rate_scale=0.25)
    optimization.backward(optimization.module.weight.sum())
    optimization.step(0)
    assert optimization.module.weight.flatten().tolist() == [-0.25, -0.25]


def sgd(clipping: Clipping, rate_scale: float = 1.0) -> OptimizerStep:
    """Plain descent at rate 1 from zero weights: what the weights become is minus the gradient."""
    module = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(module.weight)
    optimizer = torch.optim.SGD([{"params": [module.weight], "rate_scale": rate_scale}], lr=1.0)
    rate = RateSchedule(peak=1.0, total_steps=10, batch=1)
    return OptimizerStep(Fabric(accelerator="cpu", devices=1), module, optimizer, rate, clipping)
