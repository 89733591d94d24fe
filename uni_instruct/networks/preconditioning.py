"""Preconditionings: the scaling of a network's input and output that makes it a denoiser at every noise level.

The coefficients of EDM, VP, VE and iDDPM are those of Karras et al. 2022, arXiv 2206.00364, table 1, in its symbols.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from uni_instruct.errors import RequestError


class Coefficients(NamedTuple):
    """The coefficients of D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), each [B, 1, 1, 1]."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True, kw_only=True)
class Preconditioning(ABC):
    """How a network's input and output are scaled, and its range of noise levels.

    sigma_data: the standard deviation of the data, which the training losses read too.
    out_factor: the network's output has out_factor times the image's channels, of which only the first ones are used.
    Raises RequestError for invalid constants, or if they give no range of noise levels.
    """

    name: ClassVar[str]
    out_factor: ClassVar[int] = 1
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check_positive(self, "sigma_data")

    @abstractmethod
    def __call__(self, sigma: Tensor) -> Coefficients:
        """The coefficients at noise levels [B, 1, 1, 1]."""

    @property
    @abstractmethod
    def sigma_min(self) -> float:
        """The lowest noise level that the network supports."""

    @property
    @abstractmethod
    def sigma_max(self) -> float:
        """The highest noise level that the network supports."""

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest noise levels that the network supports, with the shape and type of sigma. By default sigma itself."""
        return sigma


@dataclass(frozen=True, kw_only=True)
class EDM(Preconditioning):
    """EDM's preconditioning: the network's input and target have unit variance at every noise level."""

    name: ClassVar[str] = "edm"
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self)

    def __call__(self, sigma: Tensor) -> Coefficients:
        """The coefficients at noise levels [B, 1, 1, 1]."""
        # c_skip = s_d^2 / (s^2 + s_d^2), c_out = s s_d / sqrt(s^2 + s_d^2), c_in = 1 / sqrt(s^2 + s_d^2), c_noise = ln(s) / 4.
        total = sigma**2 + self.sigma_data**2
        return Coefficients(
            c_skip=self.sigma_data**2 / total,
            c_out=sigma * self.sigma_data / total**0.5,
            c_in=1 / total**0.5,
            c_noise=sigma.log() / 4,
        )


@dataclass(frozen=True, kw_only=True)
class VP(Preconditioning):
    """Preconditioning of variance-preserving diffusion (Song et al. 2021, arXiv 2011.13456): the network predicts the noise.

    Its noise label is (M - 1) t, with the time t in [epsilon_t, 1].
    """

    name: ClassVar[str] = "vp"
    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "beta_d", "beta_min", "epsilon_t")
        _check_steps(self, self.M)
        _check_range(self)

    def __call__(self, sigma: Tensor) -> Coefficients:
        """The coefficients at noise levels [B, 1, 1, 1]."""
        return _noise_prediction(sigma, c_noise=(self.M - 1) * self._time(sigma))

    @property
    def sigma_min(self) -> float:
        """sigma(epsilon_t)."""
        return self._sigma(self.epsilon_t)

    @property
    def sigma_max(self) -> float:
        """sigma(1)."""
        return self._sigma(1.0)

    # sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1).
    def _sigma(self, time: float) -> float:
        # In float32, as in the checkpoints of such networks: there sigma(1e-5) is 2 % lower than in float64.
        t = torch.tensor(time, dtype=torch.float32, device="cpu")
        return float(((0.5 * self.beta_d * t**2 + self.beta_min * t).exp() - 1).sqrt())

    # The inverse, t = (sqrt(beta_min^2 + 2 beta_d ln(1 + sigma^2)) - beta_min) / beta_d.
    def _time(self, sigma: Tensor) -> Tensor:
        return ((self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()).sqrt() - self.beta_min) / self.beta_d


@dataclass(frozen=True, kw_only=True)
class VE(Preconditioning):
    """Preconditioning of variance-exploding diffusion (arXiv 2011.13456): the network predicts the noise times -1."""

    name: ClassVar[str] = "ve"
    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self)

    def __call__(self, sigma: Tensor) -> Coefficients:
        """The coefficients at noise levels [B, 1, 1, 1]."""
        # c_skip = 1, c_out = s, c_in = 1, c_noise = ln(s / 2).
        one = torch.ones_like(sigma)
        return Coefficients(c_skip=one, c_out=sigma, c_in=one, c_noise=(0.5 * sigma).log())


@dataclass(frozen=True, kw_only=True)
class IDDPM(Preconditioning):
    """Preconditioning of improved DDPM (arXiv 2102.09672): the network predicts the noise at M noise levels, and a variance.

    The variance is not used.
    """

    name: ClassVar[str] = "iddpm"
    out_factor: ClassVar[int] = 2
    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_positive(self, "C_1", "C_2")
        _check_steps(self, self.M)
        _check_range(self)

    def __call__(self, sigma: Tensor) -> Coefficients:
        """The coefficients at noise levels [B, 1, 1, 1]."""
        # c_noise = M - 1 - argmin_j |u_j - sigma|.
        return _noise_prediction(sigma, c_noise=self.M - 1 - self._nearest(sigma).to(sigma.dtype))

    @property
    def table(self) -> Tensor:
        """The supported noise levels, the highest first, then 0: float32 [M + 1]. EDM's checkpoints have it as buffer `u`."""
        return torch.from_numpy(_iddpm_table(self.M, self.C_1, self.C_2).copy())

    @property
    def sigma_min(self) -> float:
        """The lowest level above 0."""
        return float(_iddpm_table(self.M, self.C_1, self.C_2)[-2])

    @property
    def sigma_max(self) -> float:
        """The highest level."""
        return float(_iddpm_table(self.M, self.C_1, self.C_2)[0])

    def round_sigma(self, sigma: Tensor) -> Tensor:
        """The nearest levels of the table, with the shape and type of sigma."""
        return self.table.to(sigma.device)[self._nearest(sigma)].to(sigma.dtype)

    def _nearest(self, sigma: Tensor) -> Tensor:
        distance = (sigma.detach().float()[..., None] - self.table.to(sigma.device)).abs()
        return distance.argmin(-1)


PRECONDITIONINGS: dict[str, type[Preconditioning]] = {kind.name: kind for kind in (EDM, VP, VE, IDDPM)}


# c_skip = 1, c_out = -s, c_in = 1 / sqrt(s^2 + 1).
def _noise_prediction(sigma: Tensor, c_noise: Tensor) -> Coefficients:
    """Coefficients of a network that predicts the noise. Its input has unit variance if the data have unit variance."""
    return Coefficients(c_skip=torch.ones_like(sigma), c_out=-sigma, c_in=1 / (sigma**2 + 1).sqrt(), c_noise=c_noise)


# u_M = 0, u_{j-1} = sqrt((u_j^2 + 1) / max(a_{j-1} / a_j, C_1) - 1), a_j = sin^2(pi/2 j / (M (C_2 + 1))).
@lru_cache(maxsize=8)
def _iddpm_table(steps: int, c_1: float, c_2: float) -> np.ndarray:
    """EDM's u_j, j = 0..steps: float32 [steps + 1]."""
    # In float32 throughout, as in EDM's checkpoints: float64 differs by up to 5e-4. On the CPU and as a NumPy array, because
    # lru_cache keeps it: a tensor made on the "meta" device or in inference mode would be unusable for later callers.
    angles = 0.5 * math.pi * torch.arange(steps + 1, device="cpu") / steps / (c_2 + 1)
    alpha_bar = angles.sin() ** 2
    ratio = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=c_1)
    levels = torch.zeros(steps + 1, device="cpu")
    for j in range(steps, 0, -1):
        levels[j - 1] = ((levels[j] ** 2 + 1) / ratio[j - 1] - 1).sqrt()
    return levels.numpy()


MAX_STEPS = 100_000


def _check_positive(preconditioning: Preconditioning, *names: str) -> None:
    for name in names:
        value = getattr(preconditioning, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise _fault(preconditioning, f"{name} {value!r} is not a positive number", f"give {name} a number above 0")


def _check_steps(preconditioning: Preconditioning, steps: int) -> None:
    if type(steps) is not int or not 2 <= steps <= MAX_STEPS:
        raise _fault(preconditioning, f"M {steps!r} is out of range", f"give M a whole number from 2 to {MAX_STEPS}")


def _check_range(preconditioning: Preconditioning) -> None:
    low, high = preconditioning.sigma_min, preconditioning.sigma_max
    numbers = all(isinstance(level, int | float) and not isinstance(level, bool) for level in (low, high))
    if not numbers or not 0 <= low < high:
        problem = f"noise levels from {low!r} to {high!r} are not a range"
        raise _fault(preconditioning, problem, "choose constants with 0 <= sigma_min < sigma_max")


def _fault(preconditioning: Preconditioning, problem: str, remedy: str) -> RequestError:
    return RequestError(f"preconditioning '{preconditioning.name}': {problem}", remedy=remedy, param="network")
