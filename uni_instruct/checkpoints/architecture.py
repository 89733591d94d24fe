"""Infer the architecture of bare weights from their names and shapes, in the class and argument names of EDM and EDM2."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from uni_instruct.errors import FileFormatError

Weights = Mapping[str, np.ndarray]

_FIRST = re.compile(r"enc\.(\d+)x\1_conv\.weight")


def infer_architecture(weights: Weights) -> tuple[str, dict[str, Any]]:
    """(class name of the preconditioned network, its arguments), from weights named as in EDM or EDM2, without prefixes.

    Weights do not show everything: dropout is assumed to be 0, sigma_data 0.5, EDM2's balances their defaults, and the
    preconditioning EDM's (also for VP and VE). Raises FileFormatError if the names are not those of such a network.
    """
    first = max((int(found[1]) for name in weights if (found := _FIRST.fullmatch(name))), default=0)
    if not first:
        raise FileFormatError(
            "the weights are not those of a supported network (none is called enc.<size>x<size>_conv.weight)",
            remedy="give a file of EDM, EDM2, SiD or Uni-Instruct",
        )
    # Only EDM2's networks have emb_fourier. Of EDM's two networks, only ADM has out_conv.
    read = _edm2 if "emb_fourier.freqs" in weights else _adm if "out_conv.weight" in weights else _ddpmpp
    try:
        return read(weights, first)
    except (KeyError, IndexError, ZeroDivisionError, ValueError) as error:
        raise FileFormatError(
            f"the weights look like EDM's at {first}x{first}, but do not fit together: {error}", remedy="download it again"
        ) from error


def _ddpmpp(weights: Weights, size: int) -> tuple[str, dict[str, Any]]:
    channels = weights[f"enc.{size}x{size}_conv.weight"].shape[0]
    emb, noise = weights["map_layer0.weight"].shape
    widths, common = _common(weights, size, "conv1", "qkv", "map_label")
    has = {part: any(part in name for name in weights) for part in ("_aux_residual", "_aux_skip", "_aux_up")}
    return _class_name(common, weights[f"dec.{size}x{size}_aux_conv.weight"]), {
        **common,
        "model_type": "SongUNet",
        "model_channels": channels,
        "channel_mult": _ratios(widths, channels),
        "channel_mult_emb": _ratio(emb, channels),
        "channel_mult_noise": _ratio(noise, channels),
        "embedding_type": "fourier" if "map_noise.freqs" in weights else "positional",
        "encoder_type": "residual" if has["_aux_residual"] else "skip" if has["_aux_skip"] else "standard",
        "decoder_type": "skip" if has["_aux_up"] else "standard",
        "resample_filter": _taps(weights),
        "augment_dim": _columns(weights, "map_augment"),
    }


def _adm(weights: Weights, size: int) -> tuple[str, dict[str, Any]]:
    emb, channels = weights["map_layer0.weight"].shape
    widths, common = _common(weights, size, "conv1", "qkv", "map_label")
    return _class_name(common, weights["out_conv.weight"]), {
        **common,
        "model_type": "DhariwalUNet",
        "model_channels": channels,
        "channel_mult": _ratios(widths, channels),
        "channel_mult_emb": _ratio(emb, channels),
        "augment_dim": _columns(weights, "map_augment"),
    }


def _edm2(weights: Weights, size: int) -> tuple[str, dict[str, Any]]:
    emb, noise = weights["emb_noise.weight"].shape
    widths, common = _common(weights, size, "conv_res1", "attn_qkv", "emb_label")
    # No layer of EDM2 has model_channels channels by definition. The greatest common divisor of all widths is taken.
    channels = math.gcd(*widths, emb, noise)
    return "Precond", {
        **common,
        "model_channels": channels,
        "channel_mult": _ratios(widths, channels),
        "channel_mult_noise": _ratio(noise, channels),
        "channel_mult_emb": _ratio(emb, channels),
    }


def _class_name(common: dict[str, Any], last: np.ndarray) -> str:
    """The preconditioning, from the last layer: iDDPM's network also estimates a variance, in twice the channels."""
    return "iDDPMPrecond" if last.shape[0] == 2 * common["img_channels"] else "EDMPrecond"


def _common(weights: Weights, size: int, conv: str, qkv: str, label: str) -> tuple[list[int], dict[str, Any]]:
    """The channels of each level, and the arguments that every architecture has.

    conv, qkv and label: the architecture's names for a block's convolution, its attention, and the layer of classes.
    """
    sizes = sorted({int(found[1]) for name in weights if (found := re.match(r"enc\.(\d+)x\1_block0\.", name))}, reverse=True)
    blocks = {name.split(".")[1] for name in weights if name.startswith(f"enc.{size}x{size}_block")}
    return [weights[f"enc.{at}x{at}_block0.{conv}.weight"].shape[0] for at in sizes], {
        "img_resolution": size,
        "img_channels": _image_channels(weights, size),
        "label_dim": _columns(weights, label),
        "num_blocks": len(blocks),
        "attn_resolutions": [at for at in sizes if f"enc.{at}x{at}_block0.{qkv}.weight" in weights],
    }


def _image_channels(weights: Weights, size: int) -> int:
    inputs = int(weights[f"enc.{size}x{size}_conv.weight"].shape[1])
    return inputs - 1 if "emb_fourier.freqs" in weights else inputs  # EDM2 adds a channel of ones


def _columns(weights: Weights, layer: str) -> int:
    name = f"{layer}.weight"
    return int(weights[name].shape[1]) if name in weights else 0


def _taps(weights: Weights) -> list[int]:
    """The separable filter of the first resampling layer, as integers. The file holds its outer product, with a sum of 1."""
    kernels = (array for name, array in weights.items() if name.endswith("resample_filter"))
    rows = next(kernels, np.ones((1, 1, 2, 2), np.float32) / 4)[0, 0].astype(np.float64).sum(1)
    return [round(value) for value in rows / rows[0]]


def _ratios(widths: list[int], channels: int) -> list[int]:
    return [_ratio(width, channels) for width in widths]


def _ratio(width: int, channels: int) -> int:
    if width % channels:
        raise ValueError(f"{width} channels are not a multiple of {channels}")
    return width // channels
