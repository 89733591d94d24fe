"""Networks and inputs of peer_numbers/edm.json: what EDM's own code was given.

The file was made by EDM's own code (github.com/NVlabs/edm, commit 008a4e5: SongUNet and DhariwalUNet in each of
its preconditionings; torch 2.13 on a CPU, 32 bits) from the weights and inputs that `fill` and `inputs` write below: of every
variant a hash of names and shapes and, of every image, the norm and every stride-th value; of two variants the same of the
gradient in the input; of the published sizes the number of parameters. Another pass of 32 bits differs by about 1e-6.
"""

import json
import math
from typing import Any

import torch
from torch import Tensor

from builders.paths import PEER_NUMBERS
from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.spec import ModelSpec

RECORDED: dict[str, Any] = json.loads((PEER_NUMBERS / "edm.json").read_text())


SIGMA = torch.tensor([0.05, 0.9, 20.0]).reshape(3, 1, 1, 1)


def spec_of(recorded: dict[str, Any]) -> ModelSpec:
    return ModelSpec(
        name="test",
        noise_shape=(3, recorded["resolution"], recorded["resolution"]),
        num_classes=recorded["num_classes"],
        network=recorded["network"],
        network_args=recorded["args"] | {"preconditioning": recorded["preconditioning"]},
    )


def filled(name: str) -> Denoiser:
    denoiser = build_denoiser(spec_of(RECORDED["variants"][name])).eval()
    fill(denoiser)
    return denoiser


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Images, noise levels, classes, augmentation labels."""
    recorded = RECORDED["variants"][name]
    augment_dim = recorded["args"].get("augment_dim")
    return (
        wave((3, *spec_of(recorded).image_shape), 0.5, 2.0),
        SIGMA,
        torch.tensor([1, 0, 3]) if recorded["num_classes"] else None,
        wave((3, augment_dim), 1.5, 1.0) if augment_dim else None,
    )


def fill(module: torch.nn.Module) -> None:
    """Number k in the order of names has phase k: vectors are waves, those of norms about 1, and all else chirps."""
    for k, (name, parameter) in enumerate(sorted(module.named_parameters())):
        if parameter.ndim == 1:
            parameter.data = wave(tuple(parameter.shape), k, 0.2) + ("norm" in name and name.endswith("weight"))
        else:
            parameter.data = chirp(tuple(parameter.shape), k)
    for name, buffer in module.named_buffers():
        if name.endswith("freqs"):
            buffer.copy_(wave(tuple(buffer.shape), 0.5, 2.0))


def chirp(shape: tuple[int, ...], phase: float) -> Tensor:
    """As good as random, of variance 1 / fan-in; sine waves would make matrices of rank two."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(steps**2 * 0.37 + phase) * math.sqrt(2 / math.prod(shape[1:]))).reshape(shape).float()


def wave(shape: tuple[int, ...], phase: float, scale: float) -> Tensor:
    return (torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.37 + phase) * scale).reshape(shape).float()
