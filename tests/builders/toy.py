"""Gaussian mixtures in closed form: every diffused density, score and denoiser is known, so code can be held to the truth."""

from dataclasses import dataclass

import torch
from torch import Tensor

from uni_instruct.train.objective.divergences.table import Divergence


@dataclass(frozen=True)
class Mixture:
    """sum_k weights[k] N(means[k], variances[k] I); weights and variances are [K].

    means [K] make it one-dimensional, with points x of any shape; means [K, D] D-dimensional, with points x [..., D]. Noise
    levels sigma have the shape of x, without the D.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        """log p_sigma(x) of the mixture diffused to noise level sigma; x and sigma broadcast."""
        return torch.logsumexp(self._log_terms(*self._offsets(x, sigma)), dim=-1)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """grad_x log p_sigma(x), differentiable in x."""
        offsets, variance = self._offsets(x, sigma)
        pull = torch.softmax(self._log_terms(offsets, variance), dim=-1) / variance
        score = -(pull[..., None] * offsets).sum(-2)
        return score if self.means.ndim == 2 else score[..., 0]

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_sigma = x] (Tweedie)."""
        return x + (sigma**2 if self.means.ndim == 1 else sigma[..., None] ** 2) * self.score(x, sigma)

    def sample(self, n: int, rng: torch.Generator) -> Tensor:
        """n draws, reparameterised: differentiable in the means and variances."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=rng)
        noise = torch.randn(n, *self.means.shape[1:], generator=rng, dtype=self.means.dtype)
        std = self.variances[component].sqrt()
        return self.means[component] + (std if self.means.ndim == 1 else std[:, None]) * noise

    def _offsets(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """x - means [..., K, D], and the diffused variances [..., K]."""
        points, means = (x, self.means) if self.means.ndim == 2 else (x[..., None], self.means[:, None])
        return points[..., None, :] - means, self.variances + (sigma**2)[..., None]

    def _log_terms(self, offsets: Tensor, variance: Tensor) -> Tensor:
        """log of each component's weight times its density: [..., K]."""
        dims = offsets.shape[-1]
        square = (offsets**2).sum(-1)
        return self.weights.log() - square / (2 * variance) - dims / 2 * (2 * torch.pi * variance).log()


def theory_student(m: Tensor, b: Tensor) -> Mixture:
    """The student of docs/objective.md, section 'Checked'."""
    return Mixture(_double(0.4, 0.6), torch.stack([m, m + 1 + b]), _double(0.5, 0.4))


def theory_teacher() -> Mixture:
    """The teacher of the same section."""
    return Mixture(_double(0.5, 0.5), _double(-1.0, 1.2), _double(0.36, 0.64))


def divergence_by_quadrature(divergence: Divergence, teacher: Mixture, student: Mixture, sigma: Tensor | None = None) -> Tensor:
    """D_f(q_sigma || p_sigma) of one-dimensional mixtures, on a fine grid; differentiable in the student's parameters.

    sigma [L] gives one divergence a noise level; without it, it is that of the clean mixtures.
    """
    level = torch.zeros((), dtype=torch.float64) if sigma is None else sigma[:, None]
    x = (14 + 10 * level) * torch.linspace(-1, 1, 2001, dtype=torch.float64)
    log_p, log_q = student.log_density(x, level), teacher.log_density(x, level)
    ratio = (log_q - log_p).clamp(-600, 600).exp()
    return torch.trapezoid(log_p.exp() * divergence.f(ratio), x)


def as_images(points: Tensor) -> Tensor:
    """[B] or [B, D] -> [B, D, 1, 1], with D = 1 for [B]."""
    return points.reshape(len(points), -1, 1, 1)


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
