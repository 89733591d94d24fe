"""A VAE's decoder has diffusers' parameter names and numerics, is read from its files, and is refused where these are wrong.

peer_numbers/autoencoder_kl.json was made by diffusers 0.42.1's AutoencoderKL (torch 2.13 on a CPU, 32 bits), from weights and
latents that are sine waves, as `fill` and `wave` write them below: of every variant a hash of the decoder's names and shapes,
and every stride-th value that `decode` gives; and the number of parameters of Stable Diffusion's decoder.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from builders.paths import PEER_NUMBERS
from builders.vae import VAE_CONFIG, vae_spec, vae_weights, write_vae
from uni_instruct.checkpoints.autoencoder_kl import WEIGHTS, read_decoder
from uni_instruct.data.vae_latents import draw_latents
from uni_instruct.errors import BundleError, UniInstructError
from uni_instruct.networks.autoencoder import AutoencoderDecoder, build_decoder, decoder_shapes
from uni_instruct.spec import DecoderSpec, ModelSpec

RECORDED: dict[str, Any] = json.loads((PEER_NUMBERS / "autoencoder_kl.json").read_text())


@pytest.mark.parametrize("name", RECORDED["decoders"])
def test_names_and_numerics_are_those_of_diffusers(name: str) -> None:
    recorded = RECORDED["decoders"][name]
    decoder = AutoencoderDecoder(spec_of(recorded["args"])).eval()
    text = "\n".join(f"{key} {list(value.shape)}" for key, value in sorted(decoder.state_dict().items()))
    assert hashlib.sha256(text.encode()).hexdigest() == recorded["names_sha256"]
    fill(decoder)
    with torch.no_grad():
        out = decoder(wave((2, recorded["args"]["latent_channels"], 4, 6), 0.5, 2.0))
    assert list(out.shape) == recorded["shape"]
    expected = torch.tensor(recorded["outputs"])
    assert ((out.flatten()[:: recorded["stride"]] - expected).norm() / expected.norm()).item() < 1e-5


def test_stable_diffusions_decoder_has_as_many_parameters() -> None:
    recorded = RECORDED["stable_diffusion"]
    widths, layers = tuple(recorded["block_out_channels"]), recorded["layers_per_block"]
    spec = vae_spec(block_out_channels=widths, layers_per_block=layers, norm_num_groups=32)
    assert sum(math.prod(shape) for shape in decoder_shapes(spec).values()) == recorded["parameters"]
    latents = ModelSpec(name="img512", noise_shape=(4, 64, 64), latents=True)
    assert (latents.image_shape, latents.makes_pictures) == ((4, 64, 64), False)
    pictures = ModelSpec(name="img512", noise_shape=(4, 64, 64), latents=True, decoder=spec)
    assert (pictures.image_shape, pictures.makes_pictures) == ((3, 512, 512), True)
    assert ModelSpec.from_config(json.loads(json.dumps(pictures.to_config()))) == pictures


def test_a_folder_of_diffusers_is_read_whatever_its_age(tmp_path: Path) -> None:
    """Early files call attention's layers otherwise, some as 1x1 convolutions; a .safetensors may have any name."""
    weights = vae_weights()
    stored = read_decoder(str(write_vae(tmp_path / "vae")))
    assert stored.weights.keys() == decoder_shapes(stored.spec).keys()
    assert all(np.array_equal(array, weights[name]) for name, array in stored.weights.items())
    former = {}
    for name, array in weights.items():
        for now, then in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        former[name] = array[:, :, None, None] if "attentions" in name and array.ndim == 2 else array
    assert former.keys() != weights.keys()
    (write_vae(tmp_path / "old", former) / WEIGHTS).rename(tmp_path / "old" / "vae.fp32.safetensors")
    old = read_decoder(str(tmp_path / "old" / "vae.fp32.safetensors"))
    assert old.weights.keys() == stored.weights.keys()
    assert all(np.array_equal(array, stored.weights[name]) for name, array in old.weights.items())


def test_latents_of_the_data_are_brought_back_to_the_vaes_own(tmp_path: Path) -> None:
    """`data.vae_latents` brings latents to deviation 0.5; the decoder undoes it, and its [0, 1] becomes EDM2's bytes."""
    raw = np.random.default_rng(1).normal(size=(2, 4, 4, 4)).astype(np.float32) * 4
    moments = np.concatenate([raw, np.zeros_like(raw)], axis=1)
    latents = torch.from_numpy(draw_latents(moments, seeds=[0, 1]).transpose(0, 3, 1, 2).copy())
    stored = read_decoder(str(write_vae(tmp_path / "vae")))
    decoder = build_decoder(stored.spec)
    decoder.vae.load_state_dict({name: torch.from_numpy(array) for name, array in stored.weights.items()})
    with torch.no_grad():
        decoded, pictures = decoder.vae(torch.from_numpy(raw)), decoder(latents)
    levels = (pictures * 127.5 + 128).double()
    assert torch.allclose(levels, decoded.double() * 255, atol=0.01)
    assert (levels.clamp(0, 255).byte() - (decoded.clamp(0, 1) * 255).byte()).float().mean() < 0.001
    assert 20 < levels.clamp(0, 255).std() < 120


def without(*names: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in vae_weights().items() if name not in names}


def other(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    return vae_weights() | {name: array.astype(np.float32)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: write_vae(folder, without("decoder.conv_in.bias", "post_quant_conv.weight")),
            "the decoder lacks weights: decoder.conv_in.bias, post_quant_conv.weight",
        ),
        (
            lambda folder: write_vae(folder, other("decoder.conv_in.bias", np.zeros(17))),
            r"has weights of another shape: decoder.conv_in.bias \(17,\) instead of \(16,\)",
        ),
        (lambda folder: write_vae(folder, other("decoder.more", np.zeros(1))), "that are not its own: decoder.more"),
        (lambda folder: write_vae(folder, other("decoder.conv_out.bias", np.full(3, np.nan))), "conv_out.bias .* not finite"),
        (lambda folder: write_vae(folder, _class_name="AutoencoderTiny"), "describes a AutoencoderTiny of silu"),
        (lambda folder: write_vae(folder, act_fn="relu"), "describes a AutoencoderKL of relu"),
        (lambda folder: write_vae(folder, up_block_types=["AttnUpDecoderBlock2D"] * 2), "AttnUpDecoderBlock2D"),
        (lambda folder: write_vae(folder, latent_channels=16), "has 16 channels of latents, the network makes 4"),
        (
            lambda folder: write_vae(folder, block_out_channels=None),
            "does not describe a decoder: block_out_channels is 'None'",
        ),
        (lambda folder: write_vae(folder, block_out_channels=[8, 14]), r"\[8, 14\] channels do not divide into 4 groups"),
        (lambda folder: write_vae(folder, block_out_channels=[8] * 40), r"describes a decoder with block_out_channels \[8, 8"),
        (lambda folder: write_vae(folder, layers_per_block=10**9), "a decoder of 1000000000 layers"),
        (
            lambda folder: write_vae(folder, out_channels=2),
            "1 layers a block and 2 output channels, which is not supported; give one",
        ),
        (lambda folder: folder, "there is no file .*vae; "),
    ],
)
def test_what_is_no_decoder_is_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(UniInstructError, match=message) as refused:
        read_decoder(str(make(tmp_path / "vae")))
    assert refused.value.exit_code == 2


def test_files_that_are_not_safetensors_are_refused_unread(tmp_path: Path) -> None:
    folder = write_vae(tmp_path / "vae")
    torch.save({name: torch.from_numpy(array) for name, array in vae_weights().items()}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(UniInstructError, match=r"\.bin is not safetensors; nothing in it was run; give the folder"):
        read_decoder(str(folder / "diffusion_pytorch_model.bin"))
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-100])
    with pytest.raises(UniInstructError, match=r"is not a whole safetensors file|points outside the file"):
        read_decoder(str(folder))
    (folder / WEIGHTS).write_bytes(whole)
    (folder / "config.json").unlink()
    with pytest.raises(UniInstructError, match=r"there is no config.json beside .*diffusion_pytorch_model.safetensors; give"):
        read_decoder(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": False}, "a decoder of latents of 4 channels does not fit a network that makes images of 4 channels"),
        (
            {"noise_shape": (3, 8, 8)},
            "a decoder of latents of 4 channels does not fit a network that makes latents of 3 channels;",
        ),
    ],
)
def test_a_decoder_belongs_to_a_network_of_its_latents(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        ModelSpec(**({"name": "x", "noise_shape": (4, 8, 8), "latents": True, "decoder": vae_spec()} | changes))


@pytest.mark.parametrize("decoder", [7, [], {"block_out_channels": "wide"}, {"architecture": "AutoencoderKL"}])
def test_a_broken_decoder_in_a_configuration_is_an_error(decoder: Any) -> None:
    config = ModelSpec(name="x", noise_shape=(4, 8, 8), latents=True).to_config()
    with pytest.raises(TypeError):
        ModelSpec.from_config(config | {"decoder": decoder})


def spec_of(args: dict[str, Any]) -> DecoderSpec:
    """The spec of a recorded variant; its latents are the VAE's own."""
    known = {name: args[name] for name in args if name in VAE_CONFIG and name not in ("latent_channels", "use_quant_conv")}
    channels = args["latent_channels"]
    return vae_spec(
        **known
        | {"block_out_channels": tuple(args["block_out_channels"])}
        | {"latent_scale": (1.0,) * channels, "latent_shift": (0.0,) * channels}
    )


def fill(model: torch.nn.Module) -> None:
    """Tensor number k in the order of names: a sine wave of phase k, lower the more inputs a layer has; scales lie about 1."""
    for k, (name, parameter) in enumerate(sorted(model.named_parameters())):
        height = 1.5 / math.sqrt(math.prod(parameter.shape[1:])) if parameter.ndim > 1 else 0.5
        parameter.data = wave(tuple(parameter.shape), k, height) + float("norm" in name and name.endswith("weight"))


def wave(shape: tuple[int, ...], phase: float, scale: float) -> Tensor:
    return (torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.37 + phase) * scale).reshape(shape).float()
