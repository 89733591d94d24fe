"""Bundles: round trip, all or nothing, and whatever is altered, truncated or foreign is told in one line."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as save_numpy
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file

from builders.bundles import ONNX
from builders.machine import files_of_at_most
from uni_instruct import bundle as bundle_module
from uni_instruct.bundle import CONFIG, WEIGHTS, Bundle, default_generator, shipped_generators
from uni_instruct.engine import TORCH, open_engine
from uni_instruct.errors import BundleError, DiskError, RequestError
from uni_instruct.networks.build import build_denoiser, load_denoiser
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import sha256

SPEC = ModelSpec(
    name="named",
    noise_shape=(3, 12, 8),
    num_classes=2,
    class_names=("cat", "7"),
    sigma_init=1.5,
    network_args={"model_channels": 16, "channel_mult": [1, 2]},
    provenance={"data": "noise", "seed": 3},
    licence="MIT",
)
ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.ones(1, np.float32)}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = Bundle.write(tmp_path / "b", SPEC, ARRAYS, card="# card\n", samples=b"png")
    read = Bundle.open(tmp_path / "b")
    assert read.spec == SPEC
    assert read.weights_sha256 == written.weights_sha256 == sha256(tmp_path / "b" / WEIGHTS)
    assert read.weights().keys() == ARRAYS.keys()
    for name, array in read.weights().items():
        np.testing.assert_array_equal(array, ARRAYS[name])
    assert (tmp_path / "b" / "README.md").read_text() == "# card\n"
    assert (tmp_path / "b" / "samples.png").read_bytes() == b"png"


def test_half_weights_keep_the_nearest_half_and_read_as_float32(tmp_path: Path) -> None:
    """IEEE 754: a float32 in half's range rounds to the nearest of 11 significant bits, ties to even."""
    exact = np.float32([[1 + 2**-10, -65504, 2**-24, 0.0]])
    rounded = np.float32([[1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, -(1 + 2**-13)]])
    vector = np.float32([1 + 2**-20])
    weights = {
        "odd": rounded[:, :1],
        "exact": exact,
        "rounded": rounded,
        "vector": vector,
        "column": np.tile(rounded, (2, 1)).T,
    }
    written = Bundle.write(tmp_path / "b", SPEC, weights, card="", precision="fp16")
    read = Bundle.open(tmp_path / "b")
    assert (read.stored_precision(), written.weights_sha256) == ("fp16", read.weights_sha256)
    assert {array.dtype for array in read.weights().values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(read.weights()["exact"], exact)
    np.testing.assert_array_equal(read.weights()["rounded"], [[1, 1 + 2**-9, 1 + 2**-10, -1]])
    np.testing.assert_array_equal(read.weights()["vector"], vector)  # 32 bits
    np.testing.assert_array_equal(read.weights()["column"], np.float32([[1, 1 + 2**-9, 1 + 2**-10, -1]] * 2).T)
    for name, tensor in load_torch_file(read.path / WEIGHTS).items():  # which wants every array aligned
        np.testing.assert_array_equal(tensor.float().numpy(), read.weights()[name])
    again = Bundle.write(tmp_path / "again", SPEC, read.weights(), card="", precision="fp16")
    assert again.weights_sha256 == read.weights_sha256
    assert Bundle.write(tmp_path / "full", SPEC, weights, card="").stored_precision() == "fp32"


def test_a_reader_that_knows_no_half_runs_the_same_weights(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Readers before half precision gave what NumPy reads to torch, which converts it."""
    half = Bundle.write(tmp_path / "half", tiny_bundle.spec, tiny_bundle.weights(), "", precision="fp16")
    before = build_denoiser(half.spec)
    raw = load_file(half.path / WEIGHTS)
    assert np.dtype(np.float16) in {array.dtype for array in raw.values()}
    before.load_state_dict({name: torch.from_numpy(array) for name, array in raw.items()})
    now = load_denoiser(half).state_dict()
    for name, tensor in before.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, now[name], rtol=0, atol=0)


@pytest.mark.parametrize("shipped", [["digits"], ["digits", "emoji", "fashion-mnist"]])
def test_what_is_served_by_default_ships(shipped: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_generator() in shipped_generators()
    monkeypatch.setattr(bundle_module, "shipped_generators", lambda: shipped)
    assert default_generator() == shipped[-1]


def test_the_same_generator_has_the_same_bytes(tmp_path: Path) -> None:
    Bundle.write(tmp_path / "a", SPEC, ARRAYS, card="")
    Bundle.write(tmp_path / "b", SPEC, ARRAYS, card="")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interrupted_write_keeps_the_old_bundle(tmp_path: Path) -> None:
    old = Bundle.write(tmp_path / "b", SPEC, ARRAYS, card="")
    large = {"a": np.zeros(100_000, np.float32)}
    with files_of_at_most(50_000), pytest.raises(DiskError, match="cannot write"):
        Bundle.write(tmp_path / "b", SPEC, large, card="")
    assert Bundle.open(tmp_path / "b").weights_sha256 == old.weights_sha256
    with pytest.raises(TypeError):
        Bundle.write(tmp_path / "b", SPEC, {"a": np.zeros(3, np.float32)}, card=None)  # type: ignore[arg-type]
    assert Bundle.open(tmp_path / "b").weights_sha256 == old.weights_sha256
    assert os.listdir(tmp_path) == ["b"]


def test_a_new_bundle_drops_the_engines_of_the_old_one(tmp_path: Path) -> None:
    bundle = Bundle.write(tmp_path / "b", SPEC, ARRAYS, card="")
    bundle.engine_folder(ONNX).mkdir(parents=True)
    Bundle.write(tmp_path / "b", replace(SPEC, name="other"), ARRAYS, card="")
    assert not (tmp_path / "b" / "engines").exists()


@pytest.mark.parametrize(("label", "class_id"), [("cat", 0), ("7", 1), (0, 0), (1, 1), ("1", 1), ("0", 0)])
def test_classes_are_found_by_name_and_id(label: int | str, class_id: int) -> None:
    assert SPEC.class_id(label) == class_id


@pytest.mark.parametrize("label", ["dog", 2, -1, "2", "", "-1", "1.0", True, "9" * 5000])
def test_an_unknown_class_is_refused(label: int | str) -> None:
    with pytest.raises(RequestError, match=r"0\.\.1; 'uni-instruct inspect' lists the classes") as caught:
        SPEC.class_id(label)
    is_id = label in (2, -1) or str(label).isdecimal()
    assert ("is outside 0..1" if is_id else "is neither a class name nor an id in 0..1") in str(caught.value)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    "change",
    [
        {"noise_shape": (3, 0, 8)},
        {"noise_shape": (3, 8)},
        {"class_names": ("cat",)},
        {"sigma_init": 0.0},
        {"sigma_init": float("nan")},
        {"sigma_init": float("inf")},
        {"steps": 0},
        {"num_classes": -1, "class_names": ()},
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError):
        replace(SPEC, **change)


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no bundle"):
        Bundle.open(tmp_path / "missing")
    with pytest.raises(RequestError, match="is not a bundle"):
        Bundle.open(tmp_path)


def test_a_bundle_takes_the_place_of_a_bundle_and_of_nothing_else(tmp_path: Path, tiny_bundle: Bundle) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"mine")
    with pytest.raises(RequestError, match="photos holds something that is not a bundle; name another folder"):
        Bundle.write(tmp_path / "photos", tiny_bundle.spec, tiny_bundle.weights(), "")
    assert (tmp_path / "photos" / "a.png").read_bytes() == b"mine"
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        Bundle.write(tmp_path / "empty", tiny_bundle.spec, tiny_bundle.weights(), "")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value != "REMOVE"}))

    return edit


def with_weights(write: Callable[[Path], object]) -> Callable[[Path], None]:
    """Other weights whose hash the configuration knows: what a foreign or careless tool would leave."""

    def edit(folder: Path) -> None:
        write(folder / WEIGHTS)
        edit_config(weights_sha256=sha256(folder / WEIGHTS))(folder)

    return edit


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return edit


def flip_bit(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


# What happened to the bundle -> what the user is told.
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights altered": (flip_bit, "does not match the sha256 in config.json"),
    "weights truncated": (truncate(WEIGHTS, 0.5), "does not match the sha256 in config.json"),
    "weights missing": (lambda folder: (folder / WEIGHTS).unlink(), "has no model.safetensors"),
    "weights a pickle": (with_weights(lambda p: p.write_bytes(pickle.dumps({"a": 1}))), "cannot be read"),
    "weights empty": (with_weights(lambda p: p.write_bytes(b"")), "cannot be read"),
    "weights cut, hash updated": (
        with_weights(lambda p: p.write_bytes(p.read_bytes()[:-100])),
        "model.safetensors cannot be read",
    ),
    "weights in bfloat16": (
        with_weights(lambda p: save_file({"a": torch.zeros(1, dtype=torch.bfloat16)}, p)),
        "model.safetensors cannot be read",
    ),
    "weights in bfloat16, taught to NumPy": (
        with_weights(lambda p: p.write_bytes(save_numpy({"a": np.zeros(1, pytest.importorskip("ml_dtypes").bfloat16)}))),
        "model.safetensors cannot be read: a is BF16",
    ),
    "weights of another network": (
        with_weights(lambda p: save_file({"a": torch.zeros(1)}, p)),
        "do not fit its network",
    ),
    "config nested too deeply": (lambda folder: (folder / CONFIG).write_text("[" * 200_000), "config.json is not JSON"),
    "config truncated": (truncate(CONFIG, 0.5), "config.json is not JSON"),
    "config empty": (truncate(CONFIG, 0), "config.json is not JSON"),
    "config binary": (lambda folder: (folder / CONFIG).write_bytes(bytes(range(256))), "config.json is not JSON"),
    "config a list": (lambda folder: (folder / CONFIG).write_text("[]"), "is not the configuration of a bundle"),
    "config of another tool": (
        lambda folder: (folder / CONFIG).write_text('{"architectures": ["BertModel"]}'),
        "is not the configuration of a bundle",
    ),
    "config newer": (
        edit_config(format_version=99),
        "has format version 99, but this uni-instruct reads versions up to 2; update uni-instruct",
    ),
    "no shape": (edit_config(noise_shape="REMOVE"), "does not describe a generator"),
    "shape of words": (edit_config(noise_shape=["1", "8", "8"]), "does not describe a generator: noise_shape"),
    "shape of truths": (edit_config(noise_shape=[True, 8, 8]), "does not describe a generator: noise_shape"),
    "shape of zero": (edit_config(noise_shape=[1, 0, 8]), "is not"),
    "names of numbers": (edit_config(class_names=list(range(10))), "does not describe a generator: class_names"),
    "arguments a list": (edit_config(network_args=[1]), "does not describe a generator: network_args"),
    "sigma a word": (edit_config(sigma_init="2.5"), "does not describe a generator: sigma_init"),
    "sigma not a number": (edit_config(sigma_init=float("nan")), "sigma_init nan"),
    "network unknown": (edit_config(network="transformer"), "network 'transformer' is unknown; choose one of ddpmpp"),
    "argument unknown": (edit_config(network_args={"heads": 8}), "network 'ddpmpp' has no argument heads; leave it out"),
    "argument negative": (edit_config(network_args={"model_channels": -8}), "network 'ddpmpp'"),
    "sigma_data a word": (edit_config(network_args={"sigma_data": "x"}), "network 'ddpmpp'"),
    "classes other than the weights'": (edit_config(num_classes=3, class_names=[]), "do not fit its network"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_bundle_is_one_line_and_leaves_no_output(
    damage: str, tiny_bundle: Bundle, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle.path, folder)
    inflict, message = DAMAGE[damage]
    inflict(folder)
    code, output, errors = cli("generate", folder, "--seeds", "0-3", "--engine", "torch", "--out", tmp_path / "out")
    assert (code, output) == (2, "")
    assert message in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert os.listdir(tmp_path) == ["bundle"]


def test_an_undamaged_copy_works(tiny_bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle.path, tmp_path / "bundle")
    assert open_engine(tmp_path / "bundle").id == TORCH


def test_weights_that_go_while_a_command_runs_are_one_line(tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = Bundle.open(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))
    shutil.rmtree(bundle.path)
    for read in (bundle.weights, bundle.weights_bytes, bundle.stored_precision):
        with pytest.raises(BundleError, match="copy or download the whole folder again"):
            read()
