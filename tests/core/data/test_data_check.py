"""`uni-instruct data check`: what is wrong is named, file by file, and nothing else."""

import io
import json
import os
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders.data_sets import grey_zip, npy, png, zip_of
from uni_instruct.data import check_data, open_dataset, write_zip

Cli = Callable[..., tuple[int, str, str]]
GREY, WIDE, COLOUR = (png(np.zeros(shape, np.uint8)) for shape in ((4, 4), (4, 8), (4, 4, 3)))
CUT, CUT_EARLIER = GREY[:45], GREY[:20]


def found(source: object, **options: int) -> list[tuple[str, str]]:
    """File and problem, without the names of file and source that begin it."""
    wrong = check_data(str(source), **options).wrong
    return [(one.file, one.problem.removeprefix(f"{one.file} in {one.source} ")) for one in wrong]


def test_every_wrong_file_of_a_zip_is_named_in_order(tmp_path: Path, cli: Cli) -> None:
    files = {"0.png": WIDE, "1.png": GREY, "2.png": CUT, "3.png": GREY, "4.png": COLOUR, "5.png": GREY, "10.png": CUT_EARLIER}
    labels = [["0.png", 0], ["1.png", 2], ["2.png", 0], ["4.png", -1], ["5.png", "cat"], ["10.png", 1], ["gone.png", 7]]
    path = zip_of(tmp_path / "x.zip", files, {"labels": labels, "num_classes": 2})
    expected = [
        ("0.png", "is 8x4 grey, other images are 4x4 grey"),
        ("1.png", "has label 2, outside the classes 0..1"),
        ("2.png", "cannot be read: image file is truncated"),
        ("3.png", "has no label in dataset.json"),
        ("4.png", "has label -1, which is not a class: an integer from 0"),
        ("5.png", "has label cat, which is not a class: an integer from 0"),
        ("10.png", "cannot be read: Truncated File Read"),
    ]
    problems = found(path)
    assert [file for file, _ in problems] == [file for file, _ in expected]
    for (_, problem), (_, beginning) in zip(problems, expected, strict=True):
        assert problem.startswith(beginning)

    code, output, errors = cli("data", "check", path)
    assert (code, len(output.splitlines())) == (2, 7)
    assert f"0.png in {path} is 8x4 grey, other images are 4x4 grey" in output
    assert "7/7 images" in errors
    assert (
        errors.splitlines()[-1]
        == f"error: {path}: 7 files are wrong, 7 images were read; replace, remove or label the files that are listed"
    )
    code, output, _ = cli("data", "check", path, "--json")
    facts = json.loads(output)
    assert (code, facts["images"], len(facts["wrong"])) == (2, 7, 7)
    assert facts["wrong"][3] == {
        "source": str(path),
        "file": "3.png",
        "problem": f"3.png in {path} has no label in dataset.json",
    }


def test_what_is_whole_passes(tmp_path: Path, cli: Cli) -> None:
    write_zip(open_dataset("digits"), tmp_path / "digits.zip")
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((3, 4, 4, 1), np.uint8))
    latents = zip_of(tmp_path / "latents.zip", {f"{i}.npy": npy(np.ones((8, 2, 2), np.float32)) for i in range(3)})
    one_hot = grey_zip(tmp_path / "hot.zip", (1, 2), [[0, 1], [1, 0]])
    vectors = grey_zip(tmp_path / "vectors.zip", (1, 2), [[0.5, 1], [1, 0]])
    for source, count in ((tmp_path / "digits.zip", 1797), ("digits", 1797), (tmp_path / "x.npz", 3), (latents, 3)):
        code, output, _ = cli("data", "check", source, "--json")
        assert (code, json.loads(output)) == (0, {"source": str(source), "images": count, "wrong": [], "note": ""})
    assert found(one_hot) == found(vectors) == []
    code, output, errors = cli("data", "check", tmp_path / "digits.zip")
    assert (code, output) == (0, "nothing is wrong: digits, 1797 grey images of 8x8, 10 classes, licence CC-BY-4.0\n")
    assert "1797/1797 images" in errors


def test_folders_may_mix_grey_and_colour_and_with_a_resolution_sizes(tmp_path: Path) -> None:
    for name, content in (("a/1.png", GREY), ("a/2.png", COLOUR), ("b/3.png", WIDE), ("b/4.png", GREY)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert found(tmp_path) == [("b/3.png", "is 8x4 grey, other images are 4x4 grey")]
    assert found(tmp_path, resolution=4) == []
    (tmp_path / "b" / "4.png").write_bytes(b"text")
    assert found(tmp_path, resolution=4) == [("b/4.png", "cannot be read: not an image")]
    (tmp_path / "c").mkdir()
    assert ("", f"class folder c in {tmp_path} has no images") in found(tmp_path)


def test_tars_are_read_as_well(tmp_path: Path, cli: Cli) -> None:
    """A picture that is cut is found in a tar, and in a folder of tars, as `data prepare` would."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, content in (("./a/1.png", GREY), ("./a/._1.png", b"\0\5\x16\7"), ("./a/2.png", GREY[:45]), ("./b.csv", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    folder = tmp_path / "tars"
    folder.mkdir()
    (tmp_path / "x.tar").rename(folder / "x.tar")
    for source, name in ((folder, "x/a/2.png"), (folder / "x.tar", "a/2.png")):
        code, output, _ = cli("data", "check", source)
        assert (code, output) == (2, f"{name} in {source} cannot be read: image file is truncated\n")
        assert cli("data", "prepare", source, "--out", tmp_path / "y.zip")[0] == 2
        hint = r"classes are read from dataset.json or folders, not from (x/)?b.csv"
        assert re.fullmatch(rf"1 file \((x/)?b.csv\) skipped: not images; {hint}", open_dataset(source).note)


def test_colour_in_a_zip_that_says_it_is_grey_is_named(tmp_path: Path, cli: Cli) -> None:
    path = zip_of(tmp_path / "x.zip", {"0.png": GREY, "1.png": COLOUR}, {"labels": None, "image_shape": [1, 4, 4]})
    assert found(path) == [("1.png", "is 4x4 colour, other images are 4x4 grey")]
    assert cli("data", "prepare", path, "--out", tmp_path / "y.zip")[0] == 2
    assert found(path, channels=3) == found(path, channels=1) == []


def test_a_pipe_among_pictures_is_passed_over(tmp_path: Path) -> None:
    """Reading one would wait for ever."""
    (tmp_path / "1.png").write_bytes(GREY)
    os.mkfifo(tmp_path / "2.png")
    os.symlink("2.png", tmp_path / "3.png")
    assert check_data(str(tmp_path)).note == "2 files (2.png, 3.png) skipped: not images"


def test_a_device_or_a_pipe_is_no_data_set(tmp_path: Path, cli: Cli) -> None:
    """/dev/zero has no end, and nobody writes into the pipe: either was read for ever."""
    os.mkfifo(tmp_path / "pipe")
    for source in ("/dev/zero", "/dev/null", tmp_path / "pipe"):
        for command in (["data", "check"], ["inspect"], ["data", "prepare", "--out", tmp_path / "x.zip"]):
            code, _, errors = cli(*command, source)
            assert (code, str(source) in errors, len(errors.splitlines())) == (2, True, 1)


@pytest.mark.parametrize("command", [["data", "check"], ["inspect"], ["data", "prepare", "--out", "x.zip"]])
def test_an_empty_name_is_not_the_working_folder(
    tmp_path: Path, cli: Cli, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a script's variable is empty."""
    (tmp_path / "1.png").write_bytes(GREY)
    monkeypatch.chdir(tmp_path)
    assert cli(*command, "")[0] == 2
    assert cli(*command, ".")[0] == 0


def test_a_pipe_is_no_data_set_and_is_not_waited_for(tmp_path: Path, cli: Cli) -> None:
    os.mkfifo(tmp_path / "pipe")
    for command, said in ((["data", "check"], "there is no data set"), (["inspect"], "there is no bundle, data set or")):
        code, _, errors = cli(*command, tmp_path / "pipe")
        assert (code, errors.startswith(f"error: {said}")) == (2, True), errors


def test_latents_that_are_wrong_are_named(tmp_path: Path) -> None:
    good = np.ones((8, 2, 2), np.float32)
    files = {"0.npy": good, "1.npy": np.ones((8, 4, 2), np.float32), "2.npy": -good, "3.npy": good, "4.npy": good[:4]}
    path = zip_of(tmp_path / "x.zip", {name: npy(array) for name, array in files.items()})
    problems = dict(found(path))
    assert list(problems) == ["1.npy", "2.npy", "4.npy"]
    assert "other images are 2x2" in problems["1.npy"]


def test_what_concerns_a_whole_source_is_told_as_well(tmp_path: Path) -> None:
    good = grey_zip(tmp_path / "good.zip", (1, 2), [0, 1])
    (tmp_path / "cut.zip").write_bytes(good.read_bytes()[:60])
    broken = zip_of(tmp_path / "json.zip", {"a.png": GREY, "b.png": CUT}, "{")
    assert found(broken)[0][0] == "dataset.json"
    assert found(broken)[1][0] == "b.png"
    assert "is not a whole zip" in found(f"{good},{tmp_path / 'cut.zip'}")[0][1]
    other = grey_zip(tmp_path / "other.zip", (1, 2, 3), [0, 1, 2])
    assert "and 3 classes" in found(f"{good},{other}")[0][1]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged metadata
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "NPY", "ZIP"])
def test_no_damage_ends_in_anything_but_a_finding(tmp_path: Path, kind: str) -> None:
    """Bytes changed, cut out and cut off at random, in an image or in the zip itself."""
    noise = random.Random(kind)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    if kind == "NPY":
        whole, name = npy(np.ones((8, 4, 4), np.float32)), "x.npy"
    elif kind == "ZIP":
        whole, name = grey_zip(tmp_path / "whole.zip", (1, 2, 3), [0, 1, 2]).read_bytes(), ""
    else:
        Image.fromarray(pixels).save(tmp_path / "x", kind)
        whole, name = (tmp_path / "x").read_bytes(), f"x.{kind.lower()}"
    outcomes = set()
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(noise.randint(1, 6)):
            content[noise.randrange(len(content))] = noise.randrange(256)
        if noise.random() < 0.3:
            del content[noise.randrange(len(content)) :]
        path = tmp_path / "x.zip"
        if name:
            zip_of(path, {name: bytes(content)})
        else:
            path.write_bytes(content)
        problems = check_data(str(path)).wrong
        assert all("\n" not in one.problem for one in problems)
        outcomes.add(bool(problems))
    assert True in outcomes
