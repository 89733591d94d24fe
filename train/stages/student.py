"""The student's images of one step, which critic and generator share."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uni_instruct.networks.one_step import one_step


@dataclass
class StudentBatch:
    """One global batch of the generator's inputs, on this process's device where they are used.

    noise [B, C, H, W]; class_ids [B] or None. keep holds one part's images with their gradient, so that the batch that the
    critic was trained on is the one that the generator is then trained through, at the price of one evaluation.
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
        """Images of that part, without gradient; made once."""
        if self.keep:
            return self.with_grad(part).detach()
        # The critic and the ratio's forward pass ask for the same images.
        if part.start not in self._fixed:
            with torch.no_grad():
                self._fixed[part.start] = self._images(part)
        return self._fixed[part.start]

    def with_grad(self, part: slice) -> Tensor:
        """Images of that part, with the gradient to the generator's weights."""
        # Kept graphs of all micro-batches at once would be the memory that micro-batches are there to save.
        if not self.keep:
            return self._images(part)
        if self._kept is None:
            self._kept = self._images(part)
        return self._kept

    def classes(self, part: slice) -> Tensor | None:
        """Class ids of that part."""
        return None if self.class_ids is None else self.class_ids[part].to(self.device)

    def _images(self, part: slice) -> Tensor:
        return one_step(self.network, self.noise[part].to(self.device), self.classes(part), self.sigma_init)
