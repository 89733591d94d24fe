"""A tiny VAE with random weights, in the files that diffusers' `AutoencoderKL.save_pretrained` writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from uni_instruct.checkpoints.autoencoder_kl import DEFAULTS, WEIGHTS
from uni_instruct.checkpoints.latent_map import EDM2_LATENTS
from uni_instruct.networks.autoencoder import decoder_shapes
from uni_instruct.spec import DecoderSpec

# What diffusers 0.42 writes of a VAE of two levels; what is not the decoder's is there to be passed over.
VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "act_fn": "silu",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "in_channels": 3,
    "latent_channels": 4,
    "latents_mean": None,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


def vae_spec(**changes: Any) -> DecoderSpec:
    """The decoder of `VAE_CONFIG`, or another."""
    values = {name: VAE_CONFIG[name] for name in DEFAULTS} | {"block_out_channels": (8, 16)}
    values |= {"latent_scale": EDM2_LATENTS.scale, "latent_shift": EDM2_LATENTS.shift}
    return DecoderSpec(**(values | changes))


def vae_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights of `VAE_CONFIG`'s decoder, whose pictures are neither flat nor cut off, and two tensors of its encoder's half."""
    rng = np.random.default_rng(seed)
    weights = {
        name: rng.normal(float("norm" in name and name.endswith("weight")), 0.7 * np.prod(shape[1:]) ** -0.5, shape)
        for name, shape in decoder_shapes(vae_spec()).items()
    }
    weights["decoder.conv_out.bias"] = np.full(3, 0.5)  # EDM2's pixels lie in [0, 1]
    other = {"encoder.conv_in.bias": np.zeros(8), "quant_conv.bias": np.zeros(8)}
    return {name: array.astype(np.float32) for name, array in (weights | other).items()}


def write_vae(folder: Path, weights: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """The folder with its two files; changes are made to config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(vae_weights() if weights is None else weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(VAE_CONFIG | changes))
    return folder
