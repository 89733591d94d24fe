"""A network that makes a VAE's latents hands out floats, or with a decoder pictures: through files, engines, CLI and server."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from builders import checkpoints as made
from builders.bundles import random_bundle
from builders.hub import COMMIT, Hub, serving
from builders.peers import peer
from builders.runs import WITHOUT_DATA
from builders.servers import Running, start
from builders.vae import vae_spec, vae_weights, write_vae
from uni_instruct import spec as spec_module
from uni_instruct.bundle import DECODER, Bundle
from uni_instruct.checkpoints.import_bundle import attach_decoder
from uni_instruct.engine import open_engine
from uni_instruct.errors import BundleError, RequestError
from uni_instruct.export.parity import BATCHES, batches, fresh_inputs
from uni_instruct.export.targets import export_engine
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.networks.autoencoder import AutoencoderDecoder
from uni_instruct.networks.build import load_denoiser
from uni_instruct.networks.one_step import one_step
from uni_instruct.noise import Inputs, noise
from uni_instruct.reference import reference_inputs
from uni_instruct.sampling import read_samples
from uni_instruct.spec import ModelSpec
from uni_instruct.train.pipeline import train
from uni_instruct.train.recipe import load_recipe

Cli = Callable[..., tuple[int, str, str]]
# EDM2's, written out again.
MEAN, STD = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A generator of latents [4, 8, 8]. Read only."""
    return random_bundle(tmp_path_factory.mktemp("latents") / "latents", seed=3, image_shape=(4, 8, 8), latents=True)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its VAE's folder. Read only."""
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def decoded(latents: Bundle, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The generator with the decoder, exported. Read only."""
    bundle = attach_decoder(latents, str(vae), tmp_path_factory.mktemp("decoded") / "decoded")
    export_engine(bundle, "onnx-fp32")
    return bundle


def edm2_pixels(bundle: Bundle, seeds: list[int], weights: dict[str, np.ndarray]) -> np.ndarray:
    """What EDM2's own StabilityVAEEncoder.decode makes of the network's latents: uint8 [N, H, W, 3]."""
    spec = bundle.spec
    class_ids = resolve_class_ids(spec, seeds)
    labels = None if class_ids is None else torch.from_numpy(class_ids)
    decoder = AutoencoderDecoder(vae_spec())
    decoder.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items() if name[0] in "dp"})
    scale = torch.from_numpy(0.5 / STD).float().reshape(1, -1, 1, 1)
    bias = -torch.from_numpy(MEAN).float().reshape(1, -1, 1, 1) * scale
    with torch.no_grad():
        z = torch.from_numpy(noise(seeds, spec.noise_shape))
        x = decoder((one_step(load_denoiser(bundle), z, labels, spec.sigma_init) - bias) / scale)
    return x.clamp(0, 1).mul(255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def difference(images: np.ndarray, expected: np.ndarray) -> tuple[int, float]:
    """The largest difference of a pixel, and the share of pixels that differ."""
    levels = np.abs(images.astype(int) - expected.astype(int))
    return int(levels.max()), float((levels > 0).mean())


def test_edm2s_generators_make_edm2s_pictures(cli: Cli, tmp_path: Path, vae: Path) -> None:
    """The file says that it makes latents and how they are scaled; the VAE's folder is as diffusers writes it."""
    file = made.write_edm2_pickle(tmp_path / "img512.pkl", peer("EDM2", channels=4)[0])
    code, out, errors = cli("import", file, "--as", "generator", "--decoder", vae, "--out", tmp_path / "img512")
    assert code == 0, errors
    assert "edm2 of 16x16x3" in out
    assert f"next: uni-instruct serve {tmp_path / 'img512'}" in out
    bundle = Bundle.open(tmp_path / "img512")
    assert (bundle.spec.noise_shape, bundle.spec.image_shape, bundle.spec.makes_pictures) == ((4, 8, 8), (3, 16, 16), True)
    code, _, errors = cli("generate", bundle.path, "--seeds", "0-3", "--out", tmp_path / "pictures")
    assert code == 0, errors
    pictures = np.stack([np.array(Image.open(tmp_path / "pictures" / f"{seed:06d}.png")) for seed in range(4)])
    expected = edm2_pixels(bundle, [0, 1, 2, 3], vae_weights())
    assert difference(pictures, expected) <= (1, 0.002)
    assert expected.std() > 20
    _, out, _ = cli("inspect", bundle.path)
    assert "images: 16x16 (height x width), 3 channels" in out
    assert "decoder: AutoencoderKL of vae, sha256 " in out


def test_latents_are_marked_and_refused_where_pictures_are_needed(cli: Cli, tmp_path: Path, vae: Path) -> None:
    """Each refusal names one command, and that command helps."""
    file = made.write_edm2_pickle(tmp_path / "img512.pkl", peer("EDM2", channels=4)[0])
    folder = tmp_path / "img512"
    code, out, errors = cli("import", file, "--as", "generator", "--out", folder, "--json")
    assert (code, json.loads(out)["makes_pictures"]) == (0, False), errors
    assert (
        f"decoder: none, so the output is latents; to add one: uni-instruct import {folder} --decoder"
        in cli("inspect", folder)[1]
    )
    remedy = (
        f"{folder} makes a VAE's latents and has no decoder to turn them into pictures; add the VAE's decoder: "
        f"uni-instruct import {folder} --decoder hf://stabilityai/sd-vae-ft-mse --out img512-pictures"
    )
    np.savez(tmp_path / "data.npz", arr_0=np.zeros((8, 8, 8, 3), np.uint8))
    for command in (
        ["serve", folder],
        ["export", folder, "--to", "onnx"],
        ["publish", folder, "--out", tmp_path / "published"],
        ["evaluate", folder, "--reference", tmp_path / "data.npz", "--samples", "16"],
    ):
        code, text, errors = cli(*command)
        assert (code, text, errors.splitlines()[-1]) == (2, "", f"error: {remedy}")
    with pytest.raises(RequestError, match=r"makes a VAE's latents and has no decoder to turn them into pictures"):
        open_engine(folder)(noise([0], (4, 8, 8)), np.array([0]))
    code, _, errors = cli("import", folder, "--decoder", vae, "--out", tmp_path / "img512-pictures")
    assert code == 0, errors
    assert Bundle.open(tmp_path / "img512-pictures").spec.image_shape == (3, 16, 16)
    before, after = ((tmp_path / name / "README.md").read_text() for name in ("img512", "img512-pictures"))
    assert ("--out latents.npz" in before, "--out images/" in before, "uni-instruct serve ." in before) == (True, False, False)
    assert ("--out latents.npz" in after, "--out images/" in after, "uni-instruct serve ." in after) == (False, True, True)


def test_latents_are_floats_whoever_hands_them_out(latents: Bundle) -> None:
    seeds = [0, 1, 2]
    class_ids = resolve_class_ids(latents.spec, seeds)
    engine = open_engine(latents)
    made = generate_images(engine, seeds, class_ids, batch=2)
    with torch.no_grad():
        z, labels = torch.from_numpy(noise(seeds, (4, 8, 8))), torch.tensor(class_ids)
        expected = one_step(load_denoiser(latents), z, labels, latents.spec.sigma_init).numpy()
    assert (made.dtype, made.shape) == (np.float32, (3, 4, 8, 8))
    assert np.allclose(made, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(made).max() > 1.1  # bytes would have cut it off
    outputs = engine.outputs(noise(seeds, (4, 8, 8)), class_ids)
    assert (outputs.images.shape, outputs.pixels.size) == ((3, 4, 8, 8), 0)
    assert generate_images(engine, [], None).shape == (0, 4, 8, 8)


def test_generate_writes_latents_under_their_own_name(cli: Cli, tmp_path: Path, latents: Bundle) -> None:
    """float32, whole, in an npz alone; nothing that looks for images finds any in it."""
    out = tmp_path / "latents.npz"
    code, text, errors = cli("generate", latents.path, "--seeds", "5-9", "--batch", "2", "--out", out)
    assert (code, "5 images of tiny by torch-fp32" in text) == (0, True), errors
    class_ids = resolve_class_ids(latents.spec, range(5, 10))
    expected = generate_images(open_engine(latents), range(5, 10), class_ids, batch=2)
    with np.load(out) as data:
        assert sorted(data.files) == ["class_ids", "latents", "request", "seeds"]
        assert (data["latents"].dtype, np.array_equal(data["latents"], expected)) == (np.float32, True)
    assert np.array_equal(read_samples(out, 2).images, expected[:2])
    assert "was complete" in cli("generate", latents.path, "--seeds", "5-9", "--batch", "2", "--out", out)[1]
    assert cli("inspect", out)[0] == 2
    for name in ("folder", "latents.zip"):
        code, _, errors = cli("generate", latents.path, "--seeds", "5-9", "--out", tmp_path / name)
        assert (code, "makes a VAE's latents, which cannot be PNGs; give an --out that ends in .npz" in errors) == (2, True)
    code, _, errors = cli("generate", latents.path, "--seeds", "5-9", "--grid", tmp_path / "grid.png")
    assert (code, "makes a VAE's latents and has no decoder to turn them into pictures; add the VAE's decoder" in errors) == (
        2,
        True,
    )
    code, _, errors = cli("generate", latents.path, "--seeds", "5", "--engine", "onnx", "--out", tmp_path / "a.npz")
    assert (code, "has no onnx engine" in errors) == (2, True)


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_engines_decode_in_bounded_memory(decoded: Bundle, runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures do not depend on how many are decoded at once, and are those of EDM2's decoder."""
    seeds = list(range(5))
    class_ids = resolve_class_ids(decoded.spec, seeds)
    engine = open_engine(decoded, runtime)
    assert decoded.spec.max_decoder_batch == 2048
    whole = engine.outputs(noise(seeds, (4, 8, 8)), class_ids)
    monkeypatch.setattr(spec_module, "_PIXELS_AT_ONCE", 2 * 16 * 16)
    assert [len(z) for z, _ in Inputs(noise(seeds, (4, 8, 8)), class_ids).parts(decoded.spec.max_decoder_batch)] == [2, 2, 1]
    parts = engine.outputs(noise(seeds, (4, 8, 8)), class_ids)
    assert np.allclose(parts.images, whole.images, atol=1e-4)
    assert difference(parts.pixels, whole.pixels) <= (1, 0.002)
    assert difference(engine(noise(seeds, (4, 8, 8)), class_ids), edm2_pixels(decoded, seeds, vae_weights())) <= (1, 0.002)


def test_the_exported_graph_holds_the_decoder(decoded: Bundle) -> None:
    (stored,) = decoded.engines().values()
    record = stored.record()
    assert record.weights_sha256 == decoded.weights_sha256
    assert record.parity["relative_l2"] < 1e-5
    reference = decoded.reference()
    assert reference is not None
    assert reference.images.shape[1:] == (3, 16, 16)


def test_checks_of_large_pictures_are_short() -> None:
    """Stable Diffusion's decoder takes a CPU half a minute for a picture: no check makes a thousand, one of each class."""
    wide = vae_spec(block_out_channels=(128, 256, 512, 512), norm_num_groups=32)
    spec = ModelSpec(name="img512", noise_shape=(4, 64, 64), latents=True, decoder=wide, num_classes=1000)
    seeds, class_ids = fresh_inputs(spec, "0" * 64)
    assert (len(seeds), batches(spec), spec.max_decoder_batch) == (8, (1, 2, 7), 2)
    assert class_ids is not None
    assert len(reference_inputs(spec)[0]) == 4
    small = dataclasses.replace(spec, noise_shape=(4, 8, 8), decoder=vae_spec())
    assert (len(fresh_inputs(small, "0" * 64)[0]), batches(small), len(reference_inputs(small)[0])) == (1000, BATCHES, 16)


def test_a_teacher_of_latents_is_decoded_too(tmp_path: Path, vae: Path) -> None:
    teacher = random_bundle(tmp_path / "teacher", seed=4, steps=3, image_shape=(4, 8, 8), latents=True)
    bundle = attach_decoder(teacher, str(vae), tmp_path / "decoded")
    class_ids = resolve_class_ids(bundle.spec, [0, 1])
    raw, images = (generate_images(open_engine(each), [0, 1], class_ids) for each in (teacher, bundle))
    assert (raw.shape, images.shape, images.dtype) == ((2, 4, 8, 8), (2, 16, 16, 3), np.uint8)
    assert images.std() > 5


def test_training_from_a_decoded_teacher_stays_in_latents(tmp_path: Path, vae: Path) -> None:
    """It never decodes: what comes out makes latents, and its decoder is attached afterwards."""
    teacher = random_bundle(tmp_path / "latents", seed=4, steps=3, num_classes=0, image_shape=(4, 8, 8), latents=True)
    decoded = attach_decoder(teacher, str(vae), tmp_path / "teacher")
    given = [
        *WITHOUT_DATA,
        f"teacher.bundle={decoded.path}",
        "distillation.batch=8",
        "distillation.duration_kimg=0.008",
        "critic_warmup_kimg=0",
    ]
    train(load_recipe("digits", [*given, "loop.grid=4", "loop.report=false"]), tmp_path / "run")
    spec = Bundle.open(tmp_path / "run" / "generator").spec
    assert (spec.image_shape, spec.latents, spec.decoder) == ((4, 8, 8), True, None)
    card = (tmp_path / "run" / "generator" / "README.md").read_text()
    assert "a VAE's latents of 8x8x4" in card
    assert "uni-instruct import . --decoder hf://stabilityai/sd-vae-ft-mse --out pictures" in card


def test_pictures_are_told_apart_by_their_decoder(latents: Bundle, decoded: Bundle, tmp_path: Path) -> None:
    """A bundle is replaced in its own folder, its hash follows the decoder, and its card says so once."""
    assert decoded.weights_sha256 != latents.weights_sha256
    copy = Bundle.open(shutil.copytree(decoded.path, tmp_path / "copy"))
    assert copy.weights_sha256 == decoded.weights_sha256
    other = attach_decoder(copy, str(write_vae(tmp_path / "other", vae_weights(seed=1))), copy.path)
    assert other.weights_sha256 == Bundle.open(copy.path).weights_sha256 != decoded.weights_sha256
    assert not other.engines()
    text = (copy.path / "README.md").read_text()
    assert (text.count("## Decoder"), "made of them by the decoder of `other" in text) == (1, True)
    assert all(np.array_equal(array, latents.weights()[name]) for name, array in other.weights().items())


def test_a_damaged_decoder_is_refused(decoded: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(decoded.path, tmp_path / "copy")
    (copy / DECODER).write_bytes(b"altered")
    with pytest.raises(BundleError, match=r"decoder.safetensors does not match the sha256 in config.json"):
        Bundle.open(copy)
    (copy / DECODER).unlink()
    with pytest.raises(BundleError, match=r"copy has no decoder.safetensors; copy or download the whole folder"):
        Bundle.open(copy)
    wider = dataclasses.replace(decoded.spec.decoder, block_out_channels=(16, 16))  # type: ignore[type-var]
    weights = decoded.decoder_weights()
    spec = dataclasses.replace(decoded.spec, decoder=wider)
    mismatch = Bundle.write(tmp_path / "mismatch", spec, decoded.weights(), "", decoder=weights)
    with pytest.raises(
        BundleError, match=r"decoder.safetensors of .*mismatch does not fit its decoder: .*; copy or download the whole"
    ):
        open_engine(mismatch)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """Weights alone, of a network of four channels."""
    save_file(
        {name: tensor.numpy() for name, tensor in peer("EDM2", channels=4)[1].state_dict().items()}, tmp_path / "w.safetensors"
    )
    return tmp_path / "w.safetensors"


def test_what_a_file_does_not_say_is_asked_for(cli: Cli, tmp_path: Path, bare: Path, vae: Path) -> None:
    out = tmp_path / "bundle"
    code, _, errors = cli("import", bare, "--out", out)
    assert code == 2
    assert "makes 4 channels, which are no picture, and the file does not say what they are; import it with --latents" in errors
    assert not out.exists()
    assert cli("import", bare, "--latents", "--out", out)[0] == 0
    assert (Bundle.open(out).spec.latents, Bundle.open(out).spec.decoder) == (True, None)
    assert cli("import", bare, "--decoder", vae, "--out", out)[0] == 0
    assert Bundle.open(out).spec.image_shape == (3, 16, 16)


def test_contradictions_are_one_line(cli: Cli, tmp_path: Path, latents: Bundle, tiny_bundle: Bundle, vae: Path) -> None:
    pictures = made.write_edm2_pickle(tmp_path / "a.pkl", peer("EDM2")[0], encoder=made.PeerObject("StandardRGBEncoder"))
    three = made.write_edm2_pickle(tmp_path / "b.pkl", peer("EDM2")[0])
    unknown = made.write_edm2_pickle(tmp_path / "c.pkl", peer("EDM2")[0], encoder=made.PeerObject("Codebook"))
    grey = made.write_sid_pickle(tmp_path / "d.pkl", peer("DDPM++")[0])
    sixteen = write_vae(tmp_path / "sixteen", latent_channels=16)
    weights = write_vae(tmp_path / "weights", {name: array for name, array in vae_weights().items() if "mid_block" not in name})
    pickled = tmp_path / "vae.bin"
    torch.save({name: torch.from_numpy(array) for name, array in vae_weights().items()}, pickled)
    out = ["--out", tmp_path / "out"]
    for arguments, message in (
        (["import", pictures, "--latents", *out], "says that its network makes pictures (StandardRGBEncoder); leave out"),
        (["import", three, *out], "encoder has 4 scales and 4 biases, its network 3 channels; download it again"),
        (["import", unknown, *out], "encoder 'Codebook' is not supported"),
        (["import", grey, "--decoder", vae, *out], "makes 3 channels, EDM2's latents have 4; leave out"),
        (["import", latents.path, *out], "is a bundle already; give --decoder VAE to add one"),
        (["import", latents.path, "--decoder", vae, "--steps", "4", *out], "--steps applies to checkpoints only, but "),
        (["import", tiny_bundle.path, "--decoder", vae, *out], "makes pictures by itself; leave --decoder out"),
        (["import", latents.path, "--decoder", sixteen, *out], "has 16 channels of latents, the network makes 4"),
        (["import", latents.path, "--decoder", weights, *out], "the decoder lacks weights: decoder.mid_block."),
        (["import", latents.path, "--decoder", pickled, *out], "is not safetensors; nothing in it was run"),
        (["import", latents.path, "--decoder", tmp_path / "nothing", *out], "there is no file"),
    ):
        code, text, errors = cli(*arguments)
        assert (code, text, errors.count("\n")) == (2, "", 1), errors
        assert message in errors
        assert not (tmp_path / "out").exists()


def test_format_1_said_latents_by_four_channels(latents: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(latents.path, tmp_path / "copy")
    config: dict[str, Any] = json.loads((copy / "config.json").read_text())
    former = {key: value for key, value in config.items() if key not in ("noise_shape", "latents", "decoder")}
    (copy / "config.json").write_text(json.dumps(former | {"format_version": 1, "image_shape": [4, 8, 8]}))
    assert Bundle.open(copy).spec == latents.spec
    assert ModelSpec.from_config(former | {"format_version": 1, "image_shape": [3, 8, 8]}).makes_pictures


@pytest.fixture
def hub(vae: Path, tmp_path: Path) -> Iterator[Hub]:
    folder = shutil.copytree(vae, tmp_path / "repository" / "vae").parent
    (folder / "unet.safetensors").write_text("no part of the VAE")
    with serving(Hub(folder)) as server:
        yield server


def test_a_vae_of_the_hub(hub: Hub, latents: Bundle, tmp_path: Path) -> None:
    """Its two files are fetched, from a folder of the repository, and nothing else."""
    from builders.machine import run_cli

    source = "hf://someone/generator/vae@v1"
    command = ["import", latents.path, "--decoder", source, "--out", tmp_path / "out"]
    done = run_cli(*command, env=hub.environment(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    decoder = Bundle.open(tmp_path / "out").spec.decoder
    assert decoder is not None
    assert decoder.source.startswith(f"hf://someone/generator/vae/diffusion_pytorch_model.safetensors@{COMMIT}, sha256 ")
    assert not any("unet" in path for path in hub.asked)


@pytest.fixture(scope="module")
def server(decoded: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start(decoded, tmp_path_factory.mktemp("server"))
    try:
        running.until_ready()
        yield running
    finally:
        running.kill()


def test_a_server_makes_pictures(server: Running, decoded: Bundle) -> None:
    spec = httpx.get(f"{server.url}/v1/spec").json()
    assert (spec["image_shape"], spec["engine"]) == ([3, 16, 16], "onnx-fp32")
    answer = httpx.post(f"{server.url}/v1/generate", json={"seeds": [7]}, timeout=60)
    assert answer.status_code == 200, answer.text
    picture = np.array(Image.open(io.BytesIO(answer.content)))
    expected = generate_images(open_engine(decoded, "torch"), [7], resolve_class_ids(decoded.spec, [7]))[0]
    assert picture.shape == (16, 16, 3)
    assert difference(picture, expected)[0] <= 1
    assert httpx.get(f"{server.url}/v1/about").json()["image_shape"] == [3, 16, 16]
