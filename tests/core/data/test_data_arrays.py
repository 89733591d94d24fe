"""Arrays as data sets, npz and IDX: what is not read is said, sizes of nothing are refused, and a few bytes fill no memory."""

import gzip
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders.data_sets import png, write_idx, zip_of
from uni_instruct.data import check_data, open_dataset
from uni_instruct.errors import FileFormatError

IMAGES, IDS = np.zeros((3, 4, 4, 1), np.uint8), np.arange(3)
HINT = ": classes are integers [N] called class_ids, labels or arr_1"


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path / "x.npz", **arrays)  # type: ignore[arg-type]
    return path / "x.npz"


@pytest.mark.parametrize(
    ("arrays", "note"),
    [
        ({"label": IDS}, f"1 array (label) skipped{HINT}"),
        ({"y": IDS, "x": IMAGES}, f"2 arrays (y, x) skipped{HINT}"),
        ({"labels": IDS, "class_names": np.array(["a", "b", "c"])}, "1 array (class_names) skipped"),
        ({"class_ids": IDS, "labels": IDS[::-1].copy()}, "1 array (labels) skipped"),
        ({"labels": IDS + 1, "z": IDS}, "labels begin at 1: class 0 has no image; 1 array (z) skipped"),
        ({"class_ids": IDS, "seeds": IDS, "request": np.array("{}")}, ""),  # as `generate` writes it
    ],
)
def test_arrays_that_are_not_read_are_counted_and_named(tmp_path: Path, arrays: dict[str, np.ndarray], note: str) -> None:
    path = npz(tmp_path, arr_0=IMAGES, **arrays)
    assert open_dataset(path).note == check_data(str(path)).note == note


def test_an_npz_without_images_says_what_it_holds(tmp_path: Path) -> None:
    path = npz(tmp_path, x_train=IMAGES, y_train=IDS)
    with pytest.raises(FileFormatError, match=r"has no arr_0 but 2 arrays \(x_train, y_train\); save the images as arr_0"):
        open_dataset(path)


@pytest.mark.parametrize("shape", [(3, 0, 4, 1), (3, 4, 0, 1), (3, 0, 0, 3)])
def test_images_of_no_pixels_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(FileFormatError, match=rf"has images of {shape[2]}x{shape[1]}; give images of at least one pixel"):
        open_dataset(npz(tmp_path, arr_0=np.zeros(shape, np.uint8)))
    write_idx(tmp_path, np.zeros(shape[:3], np.uint8), np.zeros(3, np.uint8))
    with pytest.raises(FileFormatError, match="at least one pixel"):
        open_dataset(tmp_path)


def test_what_lies_beside_idx_files_is_counted(tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    """MNIST comes with its images for testing, which are left out."""
    write_idx(tmp_path, np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8))
    assert open_dataset(tmp_path).note == ""
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"x")
    (tmp_path / "extra").mkdir()
    (tmp_path / "extra" / "1.png").write_bytes(png(IMAGES[0, :, :, 0]))
    note = "2 files (extra/1.png, t10k-images-idx3-ubyte) skipped: not of the split 'train'"
    assert open_dataset(tmp_path).note == check_data(str(tmp_path)).note == note
    assert note in cli("inspect", tmp_path)[1]


def test_a_packed_idx_file_is_read_no_further_than_its_header_says(tmp_path: Path) -> None:
    write_idx(tmp_path, np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8), compress=True)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(gzip.decompress(images.read_bytes()) + bytes(64 << 20)))
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=r"ubyte\.gz has more bytes, its header says 64; download it again"):
            open_dataset(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_an_idx_file_whose_header_announces_exabytes_is_one_line(tmp_path: Path) -> None:
    write_idx(tmp_path, np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8))
    images = tmp_path / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:4] + b"\xff" * 12 + bytes(48))
    with pytest.raises(FileFormatError, match=r"ubyte has 64 bytes, its header says \d{20,}; download it again"):
        open_dataset(tmp_path)


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    """In a zip its size is what the directory announces; on disk it may be a hole."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "1.png").write_bytes(png(IMAGES[0, :, :, 0]))
    with (tmp_path / "x" / "2.png").open("wb") as file:
        os.truncate(file.fileno(), 3 << 30)
    path = zip_of(tmp_path / "x.zip", {"1.png": png(IMAGES[0, :, :, 0]), "2.png": b"x" * 77})
    size = (3 << 30).to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace((77).to_bytes(4, "little"), size))
    for source in (tmp_path / "x", path):
        problems = [one.problem for one in check_data(str(source)).wrong]
        line = (
            f"2.png in {source} cannot be read: it has 3,221,225,472 bytes, more than the 2,147,483,648 that an image may have"
        )
        assert problems == [line]
