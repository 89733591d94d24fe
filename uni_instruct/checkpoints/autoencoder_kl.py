"""Read the decoder of a VAE as diffusers saves it (AutoencoderKL): safetensors and config.json. Every weight is checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uni_instruct.checkpoints.fit import check_fit, finite
from uni_instruct.checkpoints.latent_map import EDM2_LATENTS, LatentMap
from uni_instruct.checkpoints.safetensors_file import CONFIG, looks_like_safetensors, read_safetensors
from uni_instruct.checkpoints.source import opened
from uni_instruct.errors import BundleError, FileFormatError, RequestError
from uni_instruct.hub import fetch, is_on_hub
from uni_instruct.spec import AUTOENCODER_KL, DecoderSpec
from uni_instruct.system.files import sha256

WEIGHTS = "diffusion_pytorch_model.safetensors"
# diffusers' defaults for what config.json may leave out. block_out_channels must be there.
DEFAULTS: dict[str, Any] = {
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "out_channels": 3,
    "mid_block_add_attention": True,
    "use_post_quant_conv": True,
}
# Names of attention layers before diffusers 0.17. In files converted from Stable Diffusion's they are 1x1 convolutions.
FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION = "decoder.mid_block.attentions.0."
# Weights of the encoder, which makes latents of pictures and is not needed.
_ENCODER = ("encoder.", "quant_conv.")
_GIVE = "give the folder or .safetensors of an AutoencoderKL as diffusers saves it, with its config.json beside it"


# EDM2's VAE uses pixels D in [0, 1], and EDM2 truncates 255 D to bytes. With this scale and shift, 127.5 x + 128 equals 255 D.
EDM2_PIXEL_SCALE, EDM2_PIXEL_SHIFT = 2.0, -1 - 1 / 255


@dataclass(frozen=True, kw_only=True)
class StoredDecoder:
    """A decoder as read from a file: float32 weights by diffusers' names. Its spec has no hash until its file is written."""

    spec: DecoderSpec
    weights: Mapping[str, np.ndarray]


def read_decoder(source: str, latents: LatentMap = EDM2_LATENTS) -> StoredDecoder:
    """Read a folder that diffusers wrote, its .safetensors, or either on the hub: hf://owner/name[/folder][@revision].

    Nothing in it is run. Raises RequestError if there is none; FileFormatError if it is damaged or another kind of VAE, or if
    weights are missing, left over, of another shape, or not finite.
    """
    path, origin = _find(source)
    with opened(path) as (file, name, size):
        if not looks_like_safetensors(file, size):
            raise FileFormatError(f"{name} is not safetensors; nothing in it was run", remedy=_GIVE, param="decoder")
    tensors, config = read_safetensors(path)
    if not config:
        raise RequestError(f"there is no {CONFIG} beside {path}", remedy=_GIVE, param="decoder")
    spec = _spec(path.with_name(CONFIG), config, latents, f"{origin}, sha256 {sha256(path)}")
    weights = {_current_name(name): array for name, array in tensors.items() if not name.startswith(_ENCODER)}
    return StoredDecoder(spec=spec, weights=_checked(spec, weights))


def _find(source: str) -> tuple[Path, str]:
    """The file of weights, with its config.json beside it, and its origin."""
    if not is_on_hub(source):
        path = Path(source)
        return (path / WEIGHTS if path.is_dir() else path), Path(source).name
    address, _, revision = source.partition("@")
    folder, name = address.rsplit("/", 1) if address.endswith(".safetensors") else (address, WEIGHTS)
    at = f"@{revision}" if revision else ""
    fetch(f"{folder}/{CONFIG}{at}")  # saved beside the weights, in the folder of the same commit
    download = fetch(f"{folder}/{name}{at}")
    return download.path, download.origin


def _spec(path: Path, config: Mapping[str, Any], latents: LatentMap, source: str) -> DecoderSpec:
    class_name, activation = config.get("_class_name", AUTOENCODER_KL), config.get("act_fn", "silu")
    blocks = config.get("up_block_types", ["UpDecoderBlock2D"])
    if class_name != AUTOENCODER_KL or activation not in ("silu", "swish") or set(map(str, blocks)) != {"UpDecoderBlock2D"}:
        problem = f"{path} describes a {str(class_name)[:40]} of {str(activation)[:20]} and {str(blocks)[:60]}"
        raise FileFormatError(problem, remedy=_GIVE, param="decoder")
    if config.get("latent_channels", 4) != len(latents.scale):
        raise RequestError(
            f"the VAE {path.parent} has {str(config.get('latent_channels'))[:20]} channels of latents, the network makes "
            f"{len(latents.scale)}",
            remedy="give the VAE that the network was trained with",
            param="decoder",
        )
    values: dict[str, Any] = {"block_out_channels": config.get("block_out_channels")}
    values |= {name: config.get(name, default) for name, default in DEFAULTS.items()}
    values |= {"latent_scale": latents.scale, "latent_shift": latents.shift, "source": source}
    values |= {"pixel_scale": EDM2_PIXEL_SCALE, "pixel_shift": EDM2_PIXEL_SHIFT}
    try:
        return DecoderSpec.from_config(values)
    except TypeError as error:
        raise FileFormatError(f"{path} does not describe a decoder: {error}", remedy=_GIVE, param="decoder") from error
    except BundleError as error:
        raise FileFormatError(f"{path} describes {error.problem}", remedy=error.remedy, param="decoder") from error


def _current_name(name: str) -> str:
    """diffusers' current name of a tensor."""
    if not name.startswith(_ATTENTION):
        return name
    layer, _, kind = name.removeprefix(_ATTENTION).rpartition(".")
    return f"{_ATTENTION}{FORMER_NAMES.get(layer, layer)}.{kind}"


def _checked(spec: DecoderSpec, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights in float32, once all are known to fit."""
    from uni_instruct.networks.autoencoder import decoder_shapes

    expected = decoder_shapes(spec)
    fitted = {
        name: array.reshape(array.shape[:2]) if name.startswith(_ATTENTION) and array.shape[2:] == (1, 1) else array
        for name, array in weights.items()
    }
    check_fit("decoder", expected, fitted)
    return {name: finite(name, fitted[name]).astype(np.float32, copy=False) for name in expected}
