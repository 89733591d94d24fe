"""Preconditionings: what stands around a network so that it denoises at every noise level (arXiv 2206.00364, table 1)."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise); all [B, 1, 1, 1]."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True, kw_only=True)
class EDM:
    """EDM's: unit variance at the network's input and target at every noise level. sigma_data is the data's deviation."""

    name: ClassVar[str] = "edm"
    sigma_data: float = 0.5

    def __call__(self, sigma: Tensor) -> Coefficients:
        """The coefficients at noise levels [B, 1, 1, 1]."""
        total = sigma**2 + self.sigma_data**2
        return Coefficients(
            c_skip=self.sigma_data**2 / total,
            c_out=sigma * self.sigma_data / total**0.5,
            c_in=1 / total**0.5,
            c_noise=sigma.log() / 4,
        )
