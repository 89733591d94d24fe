"""Density ratios r = q_s / p_s from a discriminator's logits, scaled to mean 1, because E_p[r] = 1 at every noise level."""

from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from uni_instruct.schedule import RHO, SIGMA_MAX, SIGMA_MIN
from uni_instruct.train.objective.config import ObjectiveConfig


class DensityRatio:
    """Turns logits into ratios: clamp, exponentiate, scale to mean 1 over the global batch (all processes, all micro-batches).

    With ratio_mean 'none' ratios are not scaled. With 'running' they are first divided by the running mean of their noise bin,
    so that noise levels at which the discriminator is biased do not outweigh the others. Bins are equal parts of EDM's rho
    schedule; a bin's mean keeps the share ratio_momentum of itself for each sample of that bin.
    """

    def __init__(self, fabric: Fabric, bins: int):
        self.fabric, self.bins = fabric, bins
        self.running = torch.ones(bins, device=fabric.device)

    def __call__(self, logits: Tensor, sigma: Tensor, config: ObjectiveConfig) -> Tensor:
        """Ratios [b] of this process's whole shard, from logits [b] and sigma [b, 1, 1, 1]; no gradient."""
        # r = exp(clamp(logit)). Without the clamp one image of a batch could outweigh all others.
        ratio = logits.detach().float().clamp(-config.logit_clamp, config.logit_clamp).exp()
        if config.ratio_mean == "none":
            return ratio
        if config.ratio_mean == "running":
            ratio = ratio / self._running_means(ratio, sigma, config.ratio_momentum)
        # r_i / mean_j r_j over the global batch, because E_p[q / p] = 1. A constant error factor of the discriminator cancels.
        total, count = self._sum(torch.stack([ratio.sum(), ratio.new_tensor(len(ratio))]))
        return ratio * count / total

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {"running": self.running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.running = state["running"].to(self.running)

    def _running_means(self, ratio: Tensor, sigma: Tensor, momentum: float) -> Tensor:
        # m_k <- mu^n m_k + (1 - mu^n) mean of the bin's n ratios. Sums are over all processes, so that all keep the same means.
        index = noise_bin(sigma, self.bins)
        sums = torch.zeros(2, self.bins, device=ratio.device)
        sums[0].index_add_(0, index, ratio)
        sums[1].index_add_(0, index, torch.ones_like(ratio))
        totals, counts = self._sum(sums)
        # mu^n: a bin with more samples in this batch moves further.
        keep = momentum**counts
        self.running = torch.where(counts > 0, self.running * keep + totals / counts.clamp(min=1) * (1 - keep), self.running)
        return self.running[index]

    def _sum(self, values: Tensor) -> Tensor:
        total = self.fabric.all_reduce(values, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total


def noise_bin(sigma: Tensor, bins: int) -> Tensor:
    """The bin of each noise level, int64 [b]. Bins are equal parts of EDM's rho schedule."""
    # position = (s^(1/rho) - s_min^(1/rho)) / (s_max^(1/rho) - s_min^(1/rho)), in 0..1: equation 5 of EDM (arXiv 2206.00364),
    # solved for the position on the schedule.
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    position = (sigma.flatten() ** (1 / RHO) - low) / (high - low)
    return (position * bins).long().clamp(0, bins - 1)
