"""`uni-instruct data prepare`: what it writes, and that a failure leaves nothing behind."""

import json
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders.machine import run_cli
from uni_instruct.data import open_dataset
from uni_instruct.system.files import sha256

Cli = Callable[..., tuple[int, str, str]]


def test_prepare_digits(cli: Cli, tmp_path: Path) -> None:
    code, out, err = cli("data", "prepare", "digits", "--out", tmp_path / "new" / "digits.zip", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["images"], facts["image_shape"], facts["num_classes"]) == (1797, [1, 8, 8], 10)
    assert facts["sha256"] == sha256(tmp_path / "new" / "digits.zip")
    assert "1797/1797 images" in err
    assert open_dataset(tmp_path / "new" / "digits.zip").fingerprint() == open_dataset("digits").fingerprint()


def test_prepare_brings_photos_to_one_resolution(cli: Cli, tmp_path: Path) -> None:
    for number, (folder, size) in enumerate((("cats", (40, 30)), ("cats", (17, 90)), ("dogs", (64, 64)))):
        (tmp_path / "photos" / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 100, 200)).save(tmp_path / "photos" / folder / f"{number}.png")
    code, _, err = cli("data", "prepare", tmp_path / "photos", "--out", tmp_path / "mixed.zip")
    assert (code, "--resolution" in err) == (2, True)
    code, out, _ = cli("data", "prepare", tmp_path / "photos", "--resolution", "16", "--out", tmp_path / "photos.zip")
    assert code == 0
    assert "photos, 3 colour images of 16x16, 2 classes" in out
    dataset = open_dataset(tmp_path / "photos.zip")
    assert dataset.class_names == ("cats", "dogs")
    assert np.array_equal(dataset.images([2])[0], np.full((16, 16, 3), (2, 100, 200), np.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--out", "x.zip"], "there is no data set nothing"),
        (["digits", "--out", "x.tar"], "x.tar is not the name of a zip"),
        (
            ["digits", "--out", "x.zip", "--resolution", "0"],
            "Invalid value for '--resolution': 0 is not in the range 1<=x<=4096.",
        ),
        (
            ["digits", "--out", "x.zip", "--resolution", "100000"],
            "Invalid value for '--resolution': 100000 is not in the range 1<=x<=4096.",
        ),
        (["digits", "--out", "file/x.zip"], "cannot write file/x.zip"),
        (["cut.zip", "--out", "x.zip"], "cut.zip is not a whole zip"),
        (["broken.zip", "--out", "x.zip"], "2.png in broken.zip cannot be read"),
        (["digits"], "Missing option '--out'"),
    ],
)
def test_faults_are_one_line_and_leave_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cut.zip").write_bytes(b"PK\x03\x04")
    Path("file").write_text("")
    with zipfile.ZipFile("broken.zip", "w") as archive:
        Image.new("L", (4, 4)).save("1.png")
        archive.write("1.png")
        archive.writestr("2.png", b"text")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = cli("data", "prepare", *arguments)
    lines = [line for line in err.splitlines() if not line.startswith("prepare: ")]
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run_cli("data", "prepare", "digits", "--out", tmp_path / "digits.zip", preexec_fn=small_disk)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: cannot write {tmp_path / 'digits.zip'}: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
