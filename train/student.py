"""The student: images from latents in one evaluation, and the batch of them that critic and generator share in a step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def one_step(network: Any, latents: Tensor, sigma_init: float, class_ids: Tensor | None) -> Tensor:
    """G(z) = D(sigma_init z; sigma_init): images [B, C, H, W] in about [-1, 1]."""
    sigma = latents.new_full((len(latents), 1, 1, 1), sigma_init)
    images: Tensor = network(latents * sigma_init, sigma, class_ids)
    return images


@dataclass
class StudentBatch:
    """One global batch of the generator's inputs, on this process's device where they are used.

    latents [B, C, H, W]; class_ids [B] or None. keep holds one part's images with their gradient, so that the batch that the
    critic was trained on is the one that the generator is then trained through, at the price of one evaluation.
    """

    network: Any
    sigma_init: float
    latents: Tensor
    class_ids: Tensor | None
    keep: bool
    device: torch.device

    def __post_init__(self) -> None:
        self._kept: Tensor | None = None
        self._fixed: dict[int, Tensor] = {}

    def fixed(self, part: slice) -> Tensor:
        """Images of that part, without gradient; made once."""
        if self.keep:
            return self.moving(part).detach()
        if part.start not in self._fixed:
            with torch.no_grad():
                self._fixed[part.start] = self._images(part)
        return self._fixed[part.start]

    def moving(self, part: slice) -> Tensor:
        """Images of that part, with the gradient to the generator's weights."""
        if not self.keep:
            return self._images(part)
        if self._kept is None:
            self._kept = self._images(part)
        return self._kept

    def classes(self, part: slice) -> Tensor | None:
        """Class ids of that part."""
        return None if self.class_ids is None else self.class_ids[part].to(self.device)

    def _images(self, part: slice) -> Tensor:
        return one_step(self.network, self.latents[part].to(self.device), self.sigma_init, self.classes(part))
