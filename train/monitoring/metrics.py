"""Metrics of one update, averaged over micro-batches and processes."""

from collections.abc import Mapping

import torch
from lightning_fabric import Fabric
from torch import Tensor

Metrics = dict[str, Tensor]


class Tally:
    """Per-image values of an update, and their means over the global batch. All processes must add the same names."""

    def __init__(self, fabric: Fabric):
        self.fabric = fabric
        self._values: dict[str, list[Tensor]] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add values of one micro-batch: name -> [b]."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float())

    def means(self) -> Metrics:
        """The mean of every name over the global batch; each process has the same number of images."""
        if not self._values:
            return {}
        # One all-reduce for all names, so that processes wait for each other once per log line.
        local = torch.stack([torch.cat(values).mean() for values in self._values.values()])
        means = self.fabric.all_reduce(local, reduce_op="mean")
        assert isinstance(means, Tensor)
        return dict(zip(self._values, means.unbind(), strict=True))
