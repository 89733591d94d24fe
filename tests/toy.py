"""Gaussian mixtures in closed form: every diffused density, score and denoiser is known, so code can be held to the truth."""

from dataclasses import dataclass

import torch
from torch import Tensor

from uni_instruct.divergence import Divergence


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] N(means[k], variances[k]) in one dimension; all tensors float64 [K]."""

    weights: Tensor
    means: Tensor
    variances: Tensor

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p_sigma(x) of the mixture diffused to noise level sigma; x and sigma broadcast."""
        variance = self.variances + (sigma**2)[..., None]
        log_terms = -((x[..., None] - self.means) ** 2) / (2 * variance) - (2 * torch.pi * variance).log() / 2
        return torch.logsumexp(self.weights.log() + log_terms, dim=-1)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad_x log p_sigma(x), differentiable in x."""
        variance = self.variances + (sigma**2)[..., None]
        log_terms = -((x[..., None] - self.means) ** 2) / (2 * variance) - variance.log() / 2
        posterior = torch.softmax(self.weights.log() + log_terms, dim=-1)
        return (posterior * (self.means - x[..., None]) / variance).sum(-1)

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_sigma = x] (Tweedie)."""
        return x + sigma**2 * self.score(x, sigma)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, reparameterised: differentiable in the means and variances."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, generator=generator, dtype=torch.float64)
        return self.means[component] + self.variances[component].sqrt() * noise


def theory_student(m: Tensor, b: Tensor) -> Mixture:
    """The student of docs/objective.md, section 'Facts to test against'."""
    return Mixture(_double(0.4, 0.6), torch.stack([m, m + 1 + b]), _double(0.5, 0.4))


def theory_teacher() -> Mixture:
    """The teacher of the same section."""
    return Mixture(_double(0.5, 0.5), _double(-1.0, 1.2), _double(0.36, 0.64))


def divergence_by_quadrature(divergence: Divergence, teacher: Mixture, student: Mixture) -> Tensor:
    """D_f(q_0 || p_0) on a fine grid; differentiable in the student's parameters."""
    x = torch.linspace(-14, 14, 40001, dtype=torch.float64)
    clean = torch.zeros_like(x)
    log_p, log_q = student.log_density(x, clean), teacher.log_density(x, clean)
    ratio = (log_q - log_p).clamp(-600, 600).exp()
    return torch.trapezoid(log_p.exp() * divergence.f(ratio), x)


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
