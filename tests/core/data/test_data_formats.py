"""Files that hold images in ways that are not read, and files of several pictures: named, with what to do about them."""

import bz2
import errno
import gzip
import io
import lzma
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders.data_sets import npy, png, zip_of
from uni_instruct.data import check_data, open_dataset
from uni_instruct.errors import FileFormatError

Cli = Callable[..., tuple[int, str, str]]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12345\n"
PICTURES = [Image.new("RGB", (4, 4), (level, 200, 100)) for level in (10, 20, 30)]


def encoded(form: str, pictures: int, mode: str = "RGB") -> bytes:
    first, *others = [picture.convert(mode) for picture in PICTURES[:pictures]]
    buffer = io.BytesIO()
    first.save(buffer, form, save_all=True, append_images=others)
    return buffer.getvalue()


@pytest.mark.parametrize(("form", "suffix"), [("TIFF", ".tif"), ("GIF", ".gif"), ("WEBP", ".webp"), ("PNG", ".apng")])
@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_several_pictures_are_named(tmp_path: Path, form: str, suffix: str, zipped: bool) -> None:
    files = {f"a{suffix}": encoded(form, 3), f"b{suffix}": encoded(form, 1), "c.png": encoded("PNG", 1)}
    path = zip_of(tmp_path / "x.zip", files) if zipped else tmp_path / "x"
    if not zipped:
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
    dataset = open_dataset(path)
    note = f"1 file (a{suffix}) with several pictures: only the first of each is read"
    assert (len(dataset), dataset.note) == (3, note)
    assert abs(int(dataset.images([0])[0, 0, 0, 0]) - 10) < 9


def test_of_very_many_files_some_are_looked_into(tmp_path: Path) -> None:
    film, picture = encoded("GIF", 2), encoded("GIF", 1)
    files = {f"{number:05d}.gif": picture if number % 4 else film for number in range(1000)}
    note = open_dataset(zip_of(tmp_path / "x.zip", files)).note
    assert re.match(r"at least \d\d+ files \(00000\.gif, .*, \.\.\.\) with several pictures: only the first of each", note)


def test_a_phones_jpeg_with_a_preview_is_one_picture(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("MPO", 2))
    assert open_dataset(tmp_path).note == ""


@pytest.mark.parametrize("form", ["BMP", "TIFF"])
def test_pictures_without_a_suffix_are_known_by_their_beginning(tmp_path: Path, form: str) -> None:
    (tmp_path / "1").write_bytes(encoded(form, 1) if form == "TIFF" else bmp())
    (tmp_path / "2").write_bytes(b"BMW and other cars")
    (tmp_path / "3.png").write_bytes(encoded("PNG", 1))
    dataset = open_dataset(tmp_path)
    assert (len(dataset), dataset.note) == (2, "1 file (2) skipped: not images")


def bmp() -> bytes:
    buffer = io.BytesIO()
    PICTURES[0].save(buffer, "BMP")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", r"cannot be read: it is empty; replace"),
        (LFS, r"cannot be read: a pointer of Git LFS; fetch the files with 'git lfs pull'$"),
    ],
)
def test_a_file_that_is_not_there_yet_is_said_so(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "b.png").write_bytes(encoded("PNG", 1))
    with pytest.raises(FileFormatError, match=rf"a\.png in .* {line}"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["x.zip", "x.npz", "x.pt", "x"])
def test_a_pointer_of_lfs_in_place_of_a_file_is_named_by_every_command(tmp_path: Path, name: str, cli: Cli) -> None:
    (tmp_path / name).write_bytes(LFS)
    for command in (
        ["inspect"],
        ["data", "check"],
        ["data", "prepare", "--out", tmp_path / "y.zip"],
        ["import", "--out", tmp_path / "b"],
    ):
        code, output, errors = cli(*command, tmp_path / name)
        assert (code, "a pointer of Git LFS" in output + errors) == (2, True), (command, output, errors)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.EACCES, "Permission denied; make it readable, or remove it"),
        (errno.ENOENT, "No such file or directory; put it back, or remove the link to it"),
        (errno.EIO, "Input/output error; replace or remove that file"),
    ],
)
def test_what_the_system_refuses_is_said_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, line: str
) -> None:
    """As where a file goes while a training runs."""
    (tmp_path / "a.png").write_bytes(encoded("PNG", 1))
    dataset = open_dataset(tmp_path)

    def refused(path: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(FileFormatError, match=rf"a\.png in .* cannot be read: {line}$"):
        dataset.images([0])


def test_broken_metadata_of_a_photograph_is_no_noise(tmp_path: Path) -> None:
    """Pillow warns at each reading, without the photograph's name."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x03\x01\x12\0\x03\0\0\0\x01\0\x01\0\0\x87\x69\0\x04"
    PICTURES[0].save(tmp_path / "a.jpg", exif=exif)
    command = [sys.executable, "-m", "uni_instruct", "data", "check", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing is wrong" in done.stdout
    assert "Warning" not in done.stderr


FILES = {
    "x.npy": (npy(np.zeros((3, 4, 4, 3), np.uint8)), "a single array, which must be saved as arr_0 of an .npz"),
    "x.parquet": (b"PAR1" + bytes(80) + b"PAR1", "a table or a container of arrays, whose images must be saved as files"),
    "x.arrow": (b"ARROW1\0\0" + bytes(80), "a table or a container of arrays"),
    "x.h5": (b"\x89HDF\r\n\x1a\n" + bytes(80), "a table or a container of arrays"),
    "x.tar.bz2": (bz2.compress(bytes(9999)), "a compressed file, which must be unpacked first"),
    "x.tar.xz": (lzma.compress(bytes(9999)), "a compressed file, which must be unpacked first"),
    "x.gz": (gzip.compress(b"x" * 999), "a compressed file, which must be unpacked first"),
    "x.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(80), "a compressed file, which must be unpacked first"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_tools_are_named_with_what_to_do(tmp_path: Path, name: str, cli: Cli) -> None:
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content)
    for command in ("inspect", "data check"):
        code, output, errors = cli(*command.split(), tmp_path / name)
        assert (code, f"is not a data set but {said}" in output + errors) == (2, True), errors


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (["data/train-00000-of-00001.parquet", "README.md"], "write the images of data/train-00000-of-00001.parquet to files"),
        (["train/data-00000.arrow", "state.json"], "write the images of train/data-00000.arrow to files"),
        (["part1.tar.gz", "part2.tar.gz"], "unpack part1.tar.gz"),
        (["images.7z"], "unpack images.7z"),
        (["README.md"], "give a "),
    ],
)
def test_a_folder_of_such_files_says_what_to_do(tmp_path: Path, names: list[str], remedy: str) -> None:
    files = dict.fromkeys(names, b"x")
    for name in names:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"x")
    for source in (tmp_path / "x", zip_of(tmp_path / "x.zip", files)):
        with pytest.raises(FileFormatError, match=rf"has no images but \d files? .*; {remedy}"):
            open_dataset(source)


def test_files_of_data_that_are_called_as_weights_are_no_weights(tmp_path: Path) -> None:
    """CIFAR-10's binary version."""
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073))
    with pytest.raises(FileFormatError, match=r"no images but 1 file \(data_batch_1.bin\); give a folder of images"):
        open_dataset(tmp_path)


def test_a_zip_within_a_folder_is_given_itself_and_one_within_a_zip_unpacked(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    inner = zip_of(tmp_path / "x" / "inner.zip", {"1.png": png(np.zeros((4, 4), np.uint8))})
    with pytest.raises(FileFormatError, match=rf"give {inner} itself$"):
        open_dataset(tmp_path / "x")
    assert check_data(str(inner)).wrong == ()
    with pytest.raises(FileFormatError, match=r"unpack inner\.zip$"):
        open_dataset(zip_of(tmp_path / "outer.zip", {"inner.zip": inner.read_bytes()}))
