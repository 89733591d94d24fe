"""inspect: what it says is what is there, for bundles, engines and data sets."""

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders.bundles import ONNX
from uni_instruct.bundle import Bundle
from uni_instruct.engines.record import RECORD, EngineRecord
from uni_instruct.networks.build import build_denoiser
from uni_instruct.reference import REFERENCE

Cli = Callable[..., tuple[int, str, str]]


def test_a_bundle_and_its_engine(exported_bundle: Bundle, cli: Cli) -> None:
    code, output, _ = cli("inspect", exported_bundle.path, "--json")
    facts = json.loads(output)
    spec = exported_bundle.spec
    denoiser = build_denoiser(spec)
    assert code == 0
    assert (facts["kind"], facts["name"], facts["image_shape"]) == ("generator", "tiny", [1, 8, 8])
    assert facts["class_names"] == list(spec.class_names)
    assert facts["network_args"] == spec.network_args
    assert facts["parameters"] == sum(tensor.numel() for tensor in denoiser.parameters())
    assert facts["weights_sha256"] == exported_bundle.weights_sha256
    record = EngineRecord.read(exported_bundle.engine_folder(ONNX))
    (engine,) = facts["engines"]
    assert engine["engine_id"] == "onnx-fp32"
    assert engine["parity"] == record.parity
    assert engine["versions"] == record.versions
    assert engine["file_bytes"] == (exported_bundle.engine_folder(ONNX) / record.file).stat().st_size
    _, text, _ = cli("inspect", exported_bundle.path)
    for part in ("generator: tiny", "images: 8x8", "classes: 10: 0, 1", f"{facts['parameters']:,}", "batch invariant: yes"):
        assert part in text
    assert f"relative L2 {record.parity['relative_l2']:.1e}" in text


def test_the_folder_of_a_training_is_answered_with_its_bundles(tiny_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    """`class folder snapshots has no images` is what it said, as of a data set."""
    run = tmp_path / "a run"
    (run / "state").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x")
    asked = (
        ["inspect", run],
        ["evaluate", run, "--reference", "digits"],
        ["generate", run, "--seeds", "0", "--out", tmp_path / "x"],
    )
    for words in asked:
        code, _, errors = cli(*words)
        assert (code, errors) == (
            2,
            f"error: {run} is the folder of a training run, not a bundle; see uni-instruct train '{run}' --status\n",
        )
    shutil.copytree(tiny_bundle.path, run / "generator")
    for words in asked:
        code, _, errors = cli(*words)
        assert code == 2
        assert errors.endswith(f"not a bundle; give '{run}/generator'\n")


def test_a_bundle_without_engines_says_how_to_export(tiny_bundle: Bundle, tiny_teacher: Bundle, cli: Cli) -> None:
    assert f"uni-instruct export {tiny_bundle.path} --to onnx" in cli("inspect", tiny_bundle.path)[1]
    text = cli("inspect", tiny_teacher.path)[1]
    assert "teacher: tiny" in text
    assert "steps: 4" in text
    assert "export" not in text


def test_an_engine_that_cannot_be_used_is_named_with_the_reason(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    bundle = Bundle.open(shutil.copytree(exported_bundle.path, tmp_path / "bundle"))
    folder = bundle.engine_folder(ONNX)
    file = folder / EngineRecord.read(folder).file
    file.write_bytes(file.read_bytes()[:-1])
    code, text, _ = cli("inspect", bundle.path)
    assert code == 0
    assert "engine onnx-fp32: cannot be used: " in text
    assert "does not match the sha256 in engine.json" in text
    (folder / RECORD).write_text("{}")
    (engine,) = json.loads(cli("inspect", bundle.path, "--json")[1])["engines"]
    assert "is not a valid engine record" in engine["error"]


def test_a_damaged_reference_is_an_error_of_every_engine(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    bundle = Bundle.open(shutil.copytree(exported_bundle.path, tmp_path / "bundle"))
    (bundle.path / REFERENCE).write_bytes(b"cut")
    code, text, errors = cli("inspect", bundle.path)
    assert (code, errors) == (0, "")
    assert "engine onnx-fp32: cannot be used: " in text
    assert "reference.npz cannot be read: it is not an npz file" in text


def test_what_a_bundle_says_of_itself_moves_no_cursor(tiny_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    spec = replace(tiny_bundle.spec, licence="\x1b[2J\ngenerator: another")
    bundle = Bundle.write(tmp_path / "bundle", spec, tiny_bundle.weights(), "")
    code, text, _ = cli("inspect", bundle.path)
    assert code == 0
    assert "licence: \\x1b[2J\\ngenerator: another\n" in text


def test_a_data_set_is_counted(tmp_path: Path, cli: Cli) -> None:
    for name, count in (("cats", 3), ("dogs", 2)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(np.full((6, 4, 3), index, np.uint8)).save(tmp_path / "pets" / name / f"{index}.png")
    code, output, _ = cli("inspect", tmp_path / "pets", "--json")
    facts = json.loads(output)
    assert code == 0
    assert (facts["kind"], facts["images"], facts["image_shape"]) == ("data", 5, [3, 6, 4])
    assert (facts["class_names"], facts["class_counts"]) == (["cats", "dogs"], [3, 2])
    text = cli("inspect", tmp_path / "pets")[1]
    for part in ("data set: pets", "images: 5 of 6x4", "classes: 2", "class cats: 3 images", "class dogs: 2 images"):
        assert part in text


def test_classes_without_images_and_many_classes_are_told(tmp_path: Path, cli: Cli) -> None:
    labels = np.array([0, 24, 24])
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 2, 2, 1), np.uint8), class_ids=labels)
    counts = json.loads(cli("inspect", tmp_path / "x.npz", "--json")[1])["class_counts"]
    assert counts == [1, *[0] * 23, 2]
    text = cli("inspect", tmp_path / "x.npz")[1]
    assert "class 1: 0 images" in text
    assert "5 more classes; --json lists them" in text


def test_a_named_data_set(cli: Cli) -> None:
    text = cli("inspect", "digits", "--data")[1]
    assert "images: 1,797 of 8x8" in text
    assert "class 0: 178 images" in text


def test_a_generator_wins_over_a_data_set_unless_told_otherwise(
    tiny_bundle: Bundle, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_bundle.path, "digits")
    assert cli("inspect", "digits")[1].startswith("generator: tiny")
    assert cli("inspect", "digits", "--data")[1].startswith("data set: digits")


def test_a_sample_set_without_classes(tmp_path: Path, cli: Cli) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 2, 2, 3), np.uint8))
    text = cli("inspect", tmp_path / "x.npz")[1]
    assert "classes: none" in text
    assert "2x2 (height x width), 3 channels" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "there is no bundle, data set or checkpoint missing; give a path, a data set (digits"),
        ("text.txt", b"hello", "text.txt is not a data set"),
        ("cut.npz", b"PK\x03\x04rubbish", "cut.npz is not a whole .npz"),
        ("cut.zip", b"PK\x03\x04rubbish", "cut.zip is not a whole zip"),
        ("config.json", b"{", "is not JSON"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    name: str, content: bytes | None, message: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    code, output, errors = cli("inspect", "." if name == "config.json" else name)
    assert (code, output) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1


def test_a_terminal_gets_a_table(tiny_bundle: Bundle) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "uni_instruct", "inspect", str(tiny_bundle.path)]
    subprocess.run(command, stdout=theirs, check=True, env=os.environ | {"COLUMNS": "200", "TERM": "xterm"})
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert "┌" in text
    assert tiny_bundle.weights_sha256 in text
