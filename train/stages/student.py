"""The student's images of one step, shared by the critic's and the student's update."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uni_instruct.networks.one_step import one_step


@dataclass
class StudentBatch:
    """The student's inputs of one global batch, and its images of them, computed when needed.

    noise [B, C, H, W] and class_ids [B] or None are on the CPU; parts are moved to `device` when used. With keep, the images
    of the one part are computed once, with gradient: the critic is trained on them, then the student is trained through them,
    for the cost of one evaluation.
    """

    network: Any
    sigma_init: float
    noise: Tensor
    class_ids: Tensor | None
    keep: bool
    device: torch.device

    def __post_init__(self) -> None:
        self._kept: Tensor | None = None
        self._fixed: dict[int, Tensor] = {}

    def detached(self, part: slice) -> Tensor:
        """Images of that part without gradient, [b, C, H, W]. Computed once."""
        if self.keep:
            return self.with_grad(part).detach()
        # Cached, because the critic's update and the ratios need the same images.
        if part.start not in self._fixed:
            with torch.no_grad():
                self._fixed[part.start] = self._images(part)
        return self._fixed[part.start]

    def with_grad(self, part: slice) -> Tensor:
        """Images of that part with a gradient to the student's weights, [b, C, H, W]."""
        # With several micro-batches nothing is kept: keeping all their graphs would need the memory that they are to save.
        if not self.keep:
            return self._images(part)
        if self._kept is None:
            self._kept = self._images(part)
        return self._kept

    def classes(self, part: slice) -> Tensor | None:
        """Class ids of that part on `device`, [b], or None."""
        return None if self.class_ids is None else self.class_ids[part].to(self.device)

    def _images(self, part: slice) -> Tensor:
        return one_step(self.network, self.noise[part].to(self.device), self.classes(part), self.sigma_init)
