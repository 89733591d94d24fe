"""Noise levels for sampling, and their distributions for training (Karras et al. 2022, arXiv 2206.00364, table 1)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


def karras_sigma(u: Any, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO) -> Any:
    """EDM's rho schedule (equation 5) at u in [0, 1], a float or an array: sigma_min at 0, sigma_max at 1."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + u * (high - low)) ** rho


def sampling_sigmas(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO) -> np.ndarray:
    """The sampler's noise levels, decreasing from sigma_max to sigma_min and then 0: float64 [steps + 1]."""
    u = np.linspace(1, 0, steps) if steps > 1 else np.ones(1)
    return np.append(karras_sigma(u, sigma_min, sigma_max, rho), 0.0)


@dataclass(frozen=True)
class LogNormalLevels:
    """Random noise levels with log sigma ~ N(mean, std^2), EDM's distribution for training denoisers."""

    mean: float = -1.2
    std: float = 1.2

    def draw(self, batch: int, rng: "torch.Generator") -> "torch.Tensor":
        """Draw one noise level for each image: float32 [B, 1, 1, 1]."""
        import torch

        return (torch.randn(batch, 1, 1, 1, generator=rng) * self.std + self.mean).exp()

    def density(self, sigma: "torch.Tensor") -> "torch.Tensor":
        """The probability density of sigma under `draw`, elementwise."""
        # p(sigma) = N(log sigma; mean, std^2) / sigma, the change of variables from log sigma to sigma.
        z = (sigma.log() - self.mean) / self.std
        return (-(z**2) / 2).exp() / (sigma * self.std * (2 * np.pi) ** 0.5)


@dataclass(frozen=True)
class KarrasLevels:
    """Random noise levels: EDM's rho schedule at u uniform on [tmin/1000, tmax/1000], SiD's distribution for its generators."""

    tmin: float = 0.0
    tmax: float = 1000.0

    def draw(self, batch: int, rng: "torch.Generator") -> "torch.Tensor":
        """Draw one noise level for each image: float32 [B, 1, 1, 1]."""
        import torch

        position = torch.rand(batch, 1, 1, 1, generator=rng)
        levels: torch.Tensor = karras_sigma((self.tmin + (self.tmax - self.tmin) * position) / 1000)
        return levels

    def density(self, sigma: "torch.Tensor") -> "torch.Tensor":
        """The probability density of sigma under `draw`, elementwise. It holds only inside the range of `draw`."""
        # p(sigma) = p(u) |du/dsigma| with u(sigma) = (sigma^(1/rho) - low) / (high - low).
        low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
        return sigma ** (1 / RHO - 1) / (RHO * (high - low) * (self.tmax - self.tmin) / 1000)


NoiseLevels = LogNormalLevels | KarrasLevels
