"""A user's own reward function: images to numbers, differentiable. It is checked before training starts."""

from collections.abc import Callable

import torch
from torch import Tensor

from uni_instruct.errors import RequestError
from uni_instruct.spec import ImageShape
from uni_instruct.train.objective.user_functions import import_named

Reward = Callable[[Tensor, Tensor | None], Tensor]


def open_reward(name: str, image_shape: ImageShape, num_classes: int) -> Reward:
    """Import the function of that name and try it on two grey images.

    The function takes images [B, C, H, W] in about [-1, 1] and class ids [B] (None without classes), and returns rewards [B]
    with a gradient to the images. Raises RequestError if it fails, or if its result is not one finite, differentiable reward
    per image.
    """
    reward: Reward = import_named(name, param="reward")
    # Two images, because a function that returns one number for the whole batch would pass with one.
    images = torch.zeros(2, *image_shape, requires_grad=True)
    class_ids = torch.zeros(2, dtype=torch.int64) if num_classes else None
    try:
        rewards = reward(images, class_ids)
    except Exception as error:  # the user's own code may raise anything
        reason = " ".join(str(error).split())
        raise _refused(name, f"fails on images [2, {_listed(image_shape)}]: {reason}") from error
    if not isinstance(rewards, Tensor) or rewards.shape != (2,):
        got = f"shape {list(rewards.shape)}" if isinstance(rewards, Tensor) else f"a {type(rewards).__name__}"
        raise _refused(name, f"returns {got} for 2 images, not shape [2]")
    if not torch.isfinite(rewards).all():
        raise _refused(name, f"returns {rewards.tolist()} for two grey images: rewards must be finite")
    # Without a gradient (a classifier's decision, a count) the reward would train nothing, and no error would show it.
    if not rewards.requires_grad:
        raise _refused(name, "has no gradient to the images")
    return reward


def _refused(name: str, problem: str) -> RequestError:
    return RequestError(
        f"reward '{name}' {problem}",
        remedy="write a function of images [B, C, H, W] and class ids that returns differentiable rewards [B]",
        param="reward",
    )


def _listed(image_shape: ImageShape) -> str:
    return ", ".join(str(side) for side in image_shape)
