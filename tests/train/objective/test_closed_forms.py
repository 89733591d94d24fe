"""The gradient between two normal distributions, without chance: quadrature over noise on one side, closed forms on the other.

With the student G(z) = m + s z and a normal teacher every diffused density is normal, and both families' expectations are
Gauss-Hermite sums. Over noise levels from a to b the expanded family is D_f at a less D_f at b.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from uni_instruct.train.objective.divergences.table import DIVERGENCES, Divergence, alpha_divergence, jeffreys
from uni_instruct.train.objective.terms import DiffusedBatch, expanded_terms, integral_terms

# Means and variances of teacher and student, q_mean, q_variance, p_mean, p_variance -> the divergence.
ClosedForm = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

TEACHER = (0.3, 0.64)
STUDENT = (-0.2, 1.3)  # m and s
LOWEST, HIGHEST, LEVEL = 0.002, 80.0, 0.5


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def kl(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    return 0.5 * ((other_variance / variance).log() + (variance + (mean - other_mean) ** 2) / other_variance - 1)


# integral of q^a p^(1 - a)
def power_integral(a: float, mq: Tensor, vq: Tensor, mp: Tensor, vp: Tensor) -> Tensor:
    square, linear = a / vq + (1 - a) / vp, a * mq / vq + (1 - a) * mp / vp
    constant = a * mq**2 / vq + (1 - a) * mp**2 / vp
    return vq ** (-a / 2) * vp ** (-(1 - a) / 2) / square.sqrt() * (0.5 * (linear**2 / square - constant)).exp()


def of_order(a: float) -> ClosedForm:
    return lambda *normals: (power_integral(a, *normals) - 1) / (a * (a - 1))


def mixed(mix: float) -> ClosedForm:
    return lambda mq, vq, mp, vp: 2 * (mix * kl(mq, vq, mp, vp) + (1 - mix) * kl(mp, vp, mq, vq))


CASES: dict[str, tuple[Divergence, ClosedForm]] = {
    "reverse-kl": (DIVERGENCES["reverse-kl"], lambda mq, vq, mp, vp: kl(mp, vp, mq, vq)),
    "forward-kl": (DIVERGENCES["forward-kl"], kl),
    "jeffreys": (DIVERGENCES["jeffreys"], mixed(0.5)),
    "jeffreys-0.2": (jeffreys(0.2), mixed(0.2)),
    "chi-square": (DIVERGENCES["chi-square"], lambda *normals: power_integral(2, *normals) - 1),
    "squared-hellinger": (DIVERGENCES["squared-hellinger"], lambda *normals: 4 * (1 - power_integral(0.5, *normals))),
    **{f"alpha-{a}": (alpha_divergence(a), of_order(a)) for a in (-0.4, 0.3, 1.5)},
}


@pytest.mark.parametrize("name", CASES)
def test_expanded_gradient_is_that_of_the_closed_form(name: str) -> None:
    divergence, closed_form = CASES[name]
    places, weights = np.polynomial.legendre.leggauss(120)
    low, high = math.log(LOWEST), math.log(HIGHEST)
    found = double(0, 0)
    for place, weight in zip(low + (places + 1) / 2 * (high - low), weights * (high - low) / 2, strict=True):
        sigma = math.exp(place)
        # The terms carry sigma^4, the expansion sigma, and d sigma = sigma d log sigma.
        found += weight * sigma**2 / sigma**4 * training_gradient(sigma, lambda *given: expanded_terms(divergence, *given))
    truth = true_gradient(closed_form, LOWEST) - true_gradient(closed_form, HIGHEST)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_integral_gradient_is_that_of_the_closed_form(name: str) -> None:
    divergence, closed_form = CASES[name]
    found = training_gradient(LEVEL, lambda *given: integral_terms(divergence, *given)) / LEVEL**2
    torch.testing.assert_close(found, true_gradient(closed_form, LEVEL), rtol=1e-9, atol=1e-11)


def true_gradient(closed_form: ClosedForm, sigma: float) -> Tensor:
    """With respect to m and s, of the distributions diffused to sigma."""
    m, s = parameters = tuple(double(value).squeeze().requires_grad_() for value in STUDENT)
    mean, variance = double(*TEACHER)
    value = closed_form(mean, variance + sigma**2, m, s**2 + sigma**2)
    return torch.stack(torch.autograd.grad(value, parameters))


def training_gradient(sigma: float, terms: Callable[[DiffusedBatch, Tensor], dict[str, Tensor]]) -> Tensor:
    """The mean over G(z) + sigma eps of what the terms give, with respect to m and s, by Gauss-Hermite in z and eps."""
    places, weights = np.polynomial.hermite_e.hermegauss(70)
    z, eps = (torch.from_numpy(grid.ravel()) for grid in np.meshgrid(places, places, indexing="ij"))
    weight = torch.from_numpy(np.outer(weights, weights).ravel() / weights.sum() ** 2)
    m, s = parameters = tuple(double(value).squeeze().requires_grad_() for value in STUDENT)
    clean = m + s * z
    noised = clean + sigma * eps
    teacher = diffused(*TEACHER, sigma)
    student = diffused(STUDENT[0], STUDENT[1] ** 2, sigma)
    ratio = (teacher.log_prob(noised.detach()) - student.log_prob(noised.detach())).exp()
    batch = DiffusedBatch(
        sigma=as_images(torch.full_like(z, sigma)),
        clean=as_images(clean),
        noised=as_images(noised),
        teacher=as_images(denoised(teacher, noised, sigma)),
        fake=as_images(denoised(student, noised, sigma)),
    )
    total = torch.stack([(weight * values).sum() for values in terms(batch, ratio).values()]).sum()
    return torch.stack(torch.autograd.grad(total, parameters))


def diffused(mean: float, variance: float, sigma: float) -> torch.distributions.Normal:
    return torch.distributions.Normal(double(mean).squeeze(), double(variance + sigma**2).sqrt().squeeze())


# Tweedie: x + sigma^2 grad log p(x)
def denoised(density: torch.distributions.Normal, x: Tensor, sigma: float) -> Tensor:
    return x - sigma**2 * (x - density.loc) / density.scale**2


def as_images(points: Tensor) -> Tensor:
    return points.reshape(-1, 1, 1, 1)
