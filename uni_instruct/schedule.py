"""Noise levels (Karras et al. 2022, arXiv 2206.00364, table 1)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


def karras_sigma(u: Any, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO) -> Any:
    """EDM's rho schedule (equation 5) at u in [0, 1]: sigma_min at 0, sigma_max at 1."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + u * (high - low)) ** rho


def sampling_sigmas(steps: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO) -> np.ndarray:
    """The sampler's noise levels, decreasing, with 0 at the end: float64 [steps + 1]."""
    u = np.linspace(1, 0, steps) if steps > 1 else np.ones(1)
    return np.append(karras_sigma(u, sigma_min, sigma_max, rho), 0.0)


@dataclass(frozen=True)
class LogNormalLevels:
    """Noise levels with log sigma ~ N(mean, std^2), as EDM trains denoisers."""

    mean: float = -1.2
    std: float = 1.2

    def draw(self, batch: int, rng: "torch.Generator") -> "torch.Tensor":
        """float32 [B, 1, 1, 1]."""
        import torch

        return (torch.randn(batch, 1, 1, 1, generator=rng) * self.std + self.mean).exp()

    def density(self, sigma: "torch.Tensor") -> "torch.Tensor":
        """The density in sigma that `draw` draws from."""
        z = (sigma.log() - self.mean) / self.std
        return (-(z**2) / 2).exp() / (sigma * self.std * (2 * np.pi) ** 0.5)


@dataclass(frozen=True)
class KarrasLevels:
    """Noise levels at a uniform position from tmin/1000 to tmax/1000 of EDM's rho schedule, as SiD trains generators."""

    tmin: float = 0.0
    tmax: float = 1000.0

    def draw(self, batch: int, rng: "torch.Generator") -> "torch.Tensor":
        """float32 [B, 1, 1, 1]."""
        import torch

        position = torch.rand(batch, 1, 1, 1, generator=rng)
        levels: torch.Tensor = karras_sigma((self.tmin + (self.tmax - self.tmin) * position) / 1000)
        return levels

    def density(self, sigma: "torch.Tensor") -> "torch.Tensor":
        """The density in sigma that `draw` draws from, at noise levels inside its range."""
        low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
        return sigma ** (1 / RHO - 1) / (RHO * (high - low) * (self.tmax - self.tmin) / 1000)


NoiseLevels = LogNormalLevels | KarrasLevels
