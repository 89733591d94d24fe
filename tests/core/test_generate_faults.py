"""generate with wrong requests: each is one line with exit code 2, and leaves nothing behind."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from builders.bundles import random_bundle
from uni_instruct.bundle import Bundle

Cli = Callable[..., tuple[int, str, str]]

# What is added to `generate BUNDLE`, in a folder that holds a file `taken` and a folder `full` -> what the user is told.
WRONG: dict[str, tuple[list[str], str]] = {
    "no seeds": (["--out", "x"], "Missing option '--seeds'"),
    "no out": (["--seeds", "0"], "Missing option '--out'"),
    "seeds of words": (["--seeds", "all", "--out", "x"], "seeds 'all' cannot be read; write them as 7, 0-63"),
    "seeds negative": (["--seeds", "-4", "--out", "x"], "seeds '-4' cannot be read"),
    "seeds of nothing": (["--seeds", "", "--out", "x"], "seeds '' cannot be read"),
    "seeds backwards": (["--seeds", "9-3", "--out", "x"], "seed range 9-3 is empty"),
    "seed too large": (["--seeds", str(2**63), "--out", "x"], "seed 9223372036854775808 is not an integer in [0, 2**63)"),
    "seeds too many": (["--seeds", "0-99999999999", "--out", "x"], "are more than 10000000; give fewer seeds"),
    "seeds twice": (["--seeds", "0-3,2", "--out", "x"], "1 seeds are repeated, but the files of a folder are named by seed"),
    "engine unknown": (["--seeds", "0", "--out", "x", "--engine", "cuda"], "engine 'cuda' is unknown; choose one of"),
    "engine not exported": (["--seeds", "0", "--out", "x", "--engine", "onnx"], "has no onnx engine; uni-instruct export"),
    "class unknown": (
        ["--seeds", "0", "--out", "x", "--class", "cat"],
        "class cat is neither a class name nor an id in 0..9; 'uni-instruct inspect'",
    ),
    "class too large": (["--seeds", "0", "--out", "x", "--class", "10"], "class 10 is outside 0..9"),
    "class negative": (["--seeds", "0", "--out", "x", "--class", "-1"], "class -1 is neither a class name nor an id in 0..9"),
    "classes too few": (
        ["--seeds", "0-2", "--out", "x", "--class", "1", "--class", "2"],
        "2 classes were given for 3 seeds; give one class, or one for each seed",
    ),
    "batch zero": (["--seeds", "0", "--out", "x", "--batch", "0"], "0 is not in the range 1<=x<=4096"),
    "batch negative": (["--seeds", "0", "--out", "x", "--batch", "-8"], "-8 is not in the range"),
    "batch huge": (["--seeds", "0", "--out", "x", "--batch", "1000000"], "1000000 is not in the range"),
    "batch a word": (["--seeds", "0", "--out", "x", "--batch", "many"], "'many' is not a valid integer"),
    "option unknown": (["--seeds", "0", "--out", "x", "--guidance", "4"], "No such option"),
    "steps of one": (["--seeds", "0", "--out", "x", "--steps", "4"], "cannot be sampled in 4 steps; leave --steps out"),
    "out an image": (
        ["--seeds", "0", "--out", "x.png"],
        "--out x.png has the unsupported suffix .png; give a folder, or a file that ends",
    ),
    "out a full folder": (["--seeds", "0", "--out", "full"], "full exists and is not a set of samples; choose another --out"),
    "out here": (["--seeds", "0", "--out", "."], ". exists and is not a set of samples; choose another --out"),
    "out a file": (["--seeds", "0", "--out", "taken"], "taken exists and is not a set of samples; choose another --out"),
    "out a file that is no npz": (["--seeds", "0", "--out", "taken.npz"], "taken.npz exists and is not a set of samples"),
    "out a file that is no zip": (["--seeds", "0", "--out", "taken.zip"], "taken.zip exists and is not a set of samples"),
    "out below a file": (["--seeds", "0", "--out", "taken/x"], "cannot write"),
    "out a folder called npz": (["--seeds", "0", "--out", "folder.npz"], "folder.npz exists and is not a set of samples"),
    "out of a long name": (["--seeds", "0", "--out", "n" * 255], "File name too long"),
    "neither out nor grid": (["--seeds", "0"], "Missing option '--out', or '--grid' to write only a picture."),
    "too many for a picture": (
        ["--seeds", "0-1024", "--grid", "g.png"],
        "--grid without --out holds at most 1024 images, not 1025",
    ),
    "no equal shares": (
        ["--seeds", "0-24", "--grid", "g.png", "--by-class"],
        "25 seeds cannot be divided equally among 10 classes",
    ),
    "class and by class": (["--seeds", "0-9", "--out", "x", "--by-class", "--class", "1"], "--class and --by-class both say"),
    "grid no png": (["--seeds", "0", "--out", "x", "--grid", "g.jpg"], "--grid g.jpg is not the name of a PNG"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    wrong: str, tiny_bundle: Bundle, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "folder.npz").mkdir()
    for name in ("taken", "taken.npz", "taken.zip", "full/letter.txt"):
        (tmp_path / name).write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    options, message = WRONG[wrong]
    code, output, errors = cli("generate", tiny_bundle.path, *options)
    assert (code, output) == (2, "")
    assert message in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert {path.read_text() for path in before if path.is_file()} == {"precious"}


@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        ("missing", "there is no bundle missing; give a folder that 'train' wrote, hf://owner/name, or a shipped generator"),
        (".", ". is not a bundle (it has no config.json)"),
        ("", "is not a bundle"),
    ],
)
def test_what_is_no_bundle_is_refused(
    bundle: str, message: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, errors = cli("generate", bundle, "--seeds", "0", "--out", "x")
    assert code == 2
    assert message in errors
    assert os.listdir(tmp_path) == []


def test_classes_of_an_unconditional_generator_are_refused(tmp_path: Path, cli: Cli) -> None:
    bundle = random_bundle(tmp_path / "bundle", seed=4, num_classes=0)
    code, _, errors = cli("generate", bundle.path, "--seeds", "0", "--class", "1", "--out", tmp_path / "x")
    assert code == 2
    assert "generator 'tiny' has no classes; leave the class out" in errors
    assert os.listdir(tmp_path) == ["bundle"]


def test_channels_that_no_picture_has_go_into_an_npz(tmp_path: Path, cli: Cli) -> None:
    bundle = random_bundle(tmp_path / "bundle", seed=4, num_classes=0, image_shape=(2, 8, 8))
    for form in ("x", "x.zip"):
        code, _, errors = cli("generate", bundle.path, "--seeds", "0", "--out", tmp_path / form)
        assert code == 2
        assert "images of 2 channels cannot be PNGs; give an --out that ends in .npz" in errors
    assert cli("generate", bundle.path, "--seeds", "0", "--out", tmp_path / "x.npz")[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["bundle", "x.npz"]


def test_a_read_only_disk_is_refused(small_disk: Path, tiny_bundle: Bundle, cli: Cli) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for form in ("x", "x.npz", "deep/x.zip"):
        code, output, errors = cli("generate", tiny_bundle.path, "--seeds", "0", "--out", small_disk / form)
        assert (code, output) == (2, "")
        assert errors.startswith("error: cannot write")
        assert errors.count("\n") == 1


def test_a_missing_torch_names_the_extra(
    tiny_bundle: Bundle, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "uni_instruct.engines.torch", raising=False)
    code, _, errors = cli("generate", tiny_bundle.path, "--seeds", "0", "--out", tmp_path / "x")
    assert code == 2
    assert "package 'torch' is not installed; pip install 'uni-instruct[train]'" in errors
    assert os.listdir(tmp_path) == []


def test_an_empty_folder_may_be_filled(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "x").mkdir()
    assert cli("generate", exported_bundle.path, "--seeds", "0-1", "--out", tmp_path / "x")[0] == 0
    assert "000001.png" in os.listdir(tmp_path / "x")


def test_seeds_twice_are_fine_where_files_are_not_named_by_them(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    options = ("--seeds", "7,7,7", "--class", "0", "--class", "1", "--class", "2")
    for form in ("x.npz", "x.zip"):
        assert cli("generate", exported_bundle.path, *options, "--out", tmp_path / form)[0] == 0
