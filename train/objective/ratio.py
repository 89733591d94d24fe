"""From a discriminator's logits to density ratios r = q_s / p_s that average one, as E_p[r] = 1 at every noise level."""

from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from uni_instruct.schedule import RHO, SIGMA_MAX, SIGMA_MIN
from uni_instruct.train.objective.config import ObjectiveConfig


class DensityRatio:
    """Clamped, exponentiated, and scaled to mean 1 over the global batch: all processes, all micro-batches.

    With ratio_mean 'running', ratios are first divided by a running mean of their noise bin (equal widths of EDM's rho
    schedule; it keeps ratio_momentum of itself per sample of the bin), so that noise levels at which the discriminator is off
    do not outweigh the others.
    """

    def __init__(self, fabric: Fabric, bins: int):
        self.fabric, self.bins = fabric, bins
        self.running = torch.ones(bins, device=fabric.device)

    def __call__(self, logits: Tensor, sigma: Tensor, config: ObjectiveConfig) -> Tensor:
        """Ratios [b] of this process's whole share, from logits [b] and sigma [b, 1, 1, 1]; no gradient."""
        # r = exp(clip(logit)). Without the clip one image of a batch could outweigh all others.
        ratio = logits.detach().float().clamp(-config.logit_clamp, config.logit_clamp).exp()
        if config.ratio_mean == "none":
            return ratio
        if config.ratio_mean == "running":
            ratio = ratio / self._running_means(ratio, sigma, config.ratio_momentum)
        # r_i / mean_j r_j over the global batch, as E_p[q / p] = 1: whatever factor the discriminator is off by cancels.
        total, count = self._sum(torch.stack([ratio.sum(), ratio.new_tensor(len(ratio))]))
        return ratio * count / total

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {"running": self.running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        self.running = state["running"].to(self.running)

    def _running_means(self, ratio: Tensor, sigma: Tensor, momentum: float) -> Tensor:
        # m_k <- mu^n m_k + (1 - mu^n) mean of the bin's n ratios. Sums over processes, so that all keep the same means.
        index = noise_bin(sigma, self.bins)
        sums = torch.zeros(2, self.bins, device=ratio.device)
        sums[0].index_add_(0, index, ratio)
        sums[1].index_add_(0, index, torch.ones_like(ratio))
        totals, counts = self._sum(sums)
        # A bin learns by as many samples as it saw.
        keep = momentum**counts
        self.running = torch.where(counts > 0, self.running * keep + totals / counts.clamp(min=1) * (1 - keep), self.running)
        return self.running[index]

    def _sum(self, values: Tensor) -> Tensor:
        total = self.fabric.all_reduce(values, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total


def noise_bin(sigma: Tensor, bins: int) -> Tensor:
    """The bin of each noise level, int64 [b]: equal parts of EDM's rho schedule."""
    # (s^(1/rho) - s_min^(1/rho)) / (s_max^(1/rho) - s_min^(1/rho)): equation 5 of EDM (arXiv 2206.00364), solved for the place.
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    position = (sigma.flatten() ** (1 / RHO) - low) / (high - low)
    return (position * bins).long().clamp(0, bins - 1)
