"""A reward that a test's recipe names: the mean pixel."""

from torch import Tensor


def reward(images: Tensor, _: Tensor | None) -> Tensor:
    return images.mean((1, 2, 3))
