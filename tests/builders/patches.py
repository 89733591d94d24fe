"""Networks that see squares of pixels as one, their twins of squares as channels, and the permutation between both."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.spec import ModelSpec

SHAPE = (3, 24, 16)
SIGMA = torch.tensor([0.05, 0.9, 20.0]).reshape(3, 1, 1, 1)


def unshuffle(images: np.ndarray, patch: int) -> np.ndarray:
    """[B, C, H, W] to [B, C patch^2, H / patch, W / patch]; a square's pixels follow each other row by row."""
    batch, channels, height, width = images.shape
    squares = images.reshape(batch, channels, height // patch, patch, width // patch, patch).transpose(0, 1, 3, 5, 2, 4)
    return squares.reshape(batch, channels * patch**2, height // patch, width // patch)


def shuffle(squares: np.ndarray, patch: int) -> np.ndarray:
    """The way back."""
    batch, channels, height, width = squares.shape
    images = squares.reshape(batch, channels // patch**2, patch, patch, height, width).transpose(0, 1, 4, 2, 5, 3)
    return images.reshape(batch, channels // patch**2, height * patch, width * patch)


def permuted(images: Tensor, patch: int) -> Tensor:
    return torch.from_numpy(unshuffle(images.numpy(), patch))


def spec_of(
    architecture: str = "ddpmpp", patch: int = 2, num_classes: int = 4, shape: tuple[int, int, int] = SHAPE, **args: Any
) -> ModelSpec:
    sizes = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [6], "dropout": 0.0}
    return ModelSpec(
        name="test",
        noise_shape=shape,
        num_classes=num_classes,
        network=architecture,
        network_args=sizes | args | ({"patch": patch} if patch > 1 else {}),
    )


def filled(spec: ModelSpec) -> Denoiser:
    """With weights of which none is zero: last layers and gains start there."""
    torch.manual_seed(0)
    denoiser, rng = build_denoiser(spec), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.ndim:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
            else:  # EDM2's gains
                parameter.fill_(1)
    return denoiser.eval()


def twin_of(denoiser: Denoiser, spec: ModelSpec) -> Denoiser:
    """The same weights, in a network of squares of pixels as channels."""
    channels, height, width = spec.image_shape
    patch = denoiser.patch
    shape = (channels * patch**2, height // patch, width // patch)
    args = {key: value for key, value in spec.network_args.items() if key != "patch"}
    twin = build_denoiser(dataclasses.replace(spec, noise_shape=shape, network_args=args))
    twin.load_state_dict(denoiser.state_dict())
    return twin.eval()


def views(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Noised images at three levels, and classes, one of them hidden."""
    return SIGMA * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(seed)), SIGMA, torch.tensor([1, -1, 3])
