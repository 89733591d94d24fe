"""Every way in which data can be wrong is one clear line."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders.data_sets import arrays_dataset, npy, png, write_idx
from uni_instruct.data import open_dataset, write_zip
from uni_instruct.errors import RequestError


def text_file(folder: Path) -> Path:
    (folder / "notes.txt").write_text("hello")
    return folder / "notes.txt"


def truncated_zip(folder: Path) -> Path:
    write_zip(arrays_dataset(np.zeros((3, 4, 4, 1), np.uint8), None), folder / "whole.zip")
    (folder / "cut.zip").write_bytes((folder / "whole.zip").read_bytes()[:300])
    return folder / "cut.zip"


def zip_with(meta: object, *names: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "made.zip", "w") as archive:
            for name in names:
                archive.writestr(name, png(np.zeros((4, 4), np.uint8)))
            archive.writestr("dataset.json", meta if isinstance(meta, str) else json.dumps(meta))
        return folder / "made.zip"

    return make


def folder_with(**files: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, content in files.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    return make


def empty_class(folder: Path) -> Path:
    (folder / "cats").mkdir()
    return folder_with(dogs__1_png=png(np.zeros((4, 4), np.uint8)))(folder)


def truncated_idx(folder: Path) -> Path:
    write_idx(folder, np.zeros((5, 4, 4), np.uint8), np.zeros(5, np.uint8))
    (folder / "train-images-idx3-ubyte").write_bytes((folder / "train-images-idx3-ubyte").read_bytes()[:40])
    return folder


def truncated_idx_gz(folder: Path) -> Path:
    write_idx(folder, np.zeros((5, 4, 4), np.uint8), np.zeros(5, np.uint8), compress=True)
    (folder / "train-images-idx3-ubyte.gz").write_bytes((folder / "train-images-idx3-ubyte.gz").read_bytes()[:30])
    return folder


def npz_with(**arrays: np.ndarray) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / "made.npz", **arrays)  # type: ignore[arg-type]
        return folder / "made.npz"

    return make


def truncated_npz(folder: Path) -> Path:
    path = npz_with(arr_0=np.zeros((2, 4, 4, 1), np.uint8))(folder)
    path.write_bytes(path.read_bytes()[:100])
    return path


def tiff(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF")
    return buffer.getvalue()


GREY, WIDE = png(np.zeros((4, 4), np.uint8)), png(np.zeros((4, 8), np.uint8))
FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "unknown": (lambda folder: folder / "nothing", r"there is no data set .*nothing; give one of digits, fashion-mnist"),
    "foreign": (text_file, r"notes\.txt is not a data set"),
    "cut zip": (truncated_zip, r"cut\.zip is not a whole zip"),
    "zip without images": (zip_with({}), r"made\.zip has no images"),
    "json": (zip_with("{", "a.png"), r"dataset\.json in .*made\.zip is not JSON"),
    "json list": (zip_with([], "a.png"), r"dataset\.json in .* is not a JSON object"),
    "label missing": (zip_with({"labels": [["b.png", 0]]}, "a.png"), r"a\.png in .* has no label in dataset\.json"),
    "labels": (zip_with({"labels": 3}, "a.png"), r"labels in .* are not a list of \[file, class\]"),
    "label": (zip_with({"labels": [["a.png", "cat"]]}, "a.png"), r"a\.png in .* has label cat, which is not a class"),
    "negative": (zip_with({"labels": [["a.png", -1]]}, "a.png"), r"has label -1, which is not a class: an integer from 0"),
    "beyond": (
        zip_with({"labels": [["a.png", 1], ["b.png", 3]], "num_classes": 3}, "a.png", "b.png"),
        r"b\.png in .* has label 3, outside the classes 0\.\.2; correct it in dataset\.json",
    ),
    "mixed labels": (
        zip_with({"labels": [["a.png", [1, 0]], ["b.png", 1]]}, "a.png", "b.png"),
        r"b\.png in .* has label 1, which is not a vector of 2 numbers",
    ),
    "uneven vectors": (
        zip_with({"labels": [["a.png", [1, 0]], ["b.png", [1, 0, 0]]]}, "a.png", "b.png"),
        r"b\.png in .* has label \[1, 0, 0\], which is not a vector of 2 numbers",
    ),
    "num_classes": (
        zip_with({"labels": [["a.png", 1]], "num_classes": "x"}, "a.png"),
        r"num_classes x in .* is not a number",
    ),
    "many classes": (zip_with({"labels": [["a.png", 10**12]]}, "a.png"), r"has label 1000000000000, which is not a class"),
    "one-hot beyond": (
        zip_with({"labels": [["a.png", [0, 0, 1]]], "num_classes": 2}, "a.png"),
        r"has labels in 2\.\.2; use 0\.\.1",
    ),
    "deep json": (zip_with("[" * 100_000, "a.png"), r"dataset\.json in .*made\.zip is not JSON"),
    "empty folder": (lambda folder: folder, r"has no images; give a folder of images"),
    "mixed sizes": (
        folder_with(a_png=GREY, b_png=WIDE),
        r"b\.png in .* is 8x4 grey, other images are 4x4 grey; .*--resolution",
    ),
    "cut image": (folder_with(a_png=GREY[:20]), r"a\.png in .* cannot be read"),
    "foreign image": (folder_with(a_png=GREY, b_png=b"text"), r"b\.png in .* cannot be read: not an image"),
    "loose image": (folder_with(a_png=GREY, dogs__b_png=GREY), r"images both in class folders and beside them \(a\.png\)"),
    "empty class": (empty_class, r"class folder cats in .* has no images"),
    "32 bit": (folder_with(a_tif=tiff(np.zeros((4, 4), np.int32))), r"pixels of mode I have neither 8 nor 16 bits"),
    "float": (folder_with(a_tif=tiff(np.zeros((4, 4), np.float32))), r"pixels of mode F have neither 8 nor 16 bits"),
    "heic called jpg": (
        folder_with(a_png=GREY, b_jpg=b"\0\0\0\x18ftypheic" + bytes(12)),
        r"b\.jpg in .* cannot be read: HEIC, which is not supported; save HEIC as JPEG or PNG",
    ),
    "cut idx": (truncated_idx, r"train-images-idx3-ubyte has 40 bytes, its header says 96"),
    "cut idx gz": (truncated_idx_gz, r"ubyte\.gz is not a whole gzip file"),
    "foreign idx": (folder_with(**{"train-images-idx3-ubyte": b"text"}), r"is not an IDX file|has no train-labels"),
    "npz": (npz_with(images=np.zeros(3)), r"made\.npz has no arr_0"),
    "npz type": (npz_with(arr_0=np.zeros((2, 4, 4, 1))), r"has arr_0 of float64 \[2, 4, 4, 1\]"),
    "npz ids": (npz_with(arr_0=np.zeros((2, 4, 4, 1), np.uint8), class_ids=np.zeros(3, int)), r"3 labels for 2 images"),
    "npz many classes": (
        npz_with(arr_0=np.zeros((1, 4, 4, 1), np.uint8), class_ids=np.array([10**12])),
        r"made\.npz has class id 1000000000000; use ids below",
    ),
    "npz empty": (npz_with(arr_0=np.zeros((0, 4, 4, 1), np.uint8)), r"has no images"),
    "npz objects": (npz_with(arr_0=np.array([{}], dtype=object)), r"made\.npz is not a whole \.npz"),
    "npz labels": (
        npz_with(arr_0=np.zeros((2, 4, 4, 1), np.uint8), labels=np.zeros((2, 3))),
        r"has labels of float64 \[2, 3\]; save them as integers",
    ),
    "latent shape": (
        folder_with(a_npy=npy(np.zeros((4, 8, 8), np.float32))),
        r"a\.npy in .* is float32 \[4, 8, 8\], not float32",
    ),
    "latent type": (folder_with(a_npy=npy(np.zeros((8, 8, 8), np.int64))), r"a\.npy in .* is int64 \[8, 8, 8\], not float32"),
    "latent objects": (folder_with(a_npy=npy(np.array([{}], dtype=object))), r"a\.npy in .* cannot be read: Object arrays"),
    "cut latent": (folder_with(a_npy=npy(np.zeros((8, 2, 2), np.float32))[:150]), r"a\.npy in .* cannot be read"),
    "latent nan": (folder_with(a_npy=npy(np.full((8, 2, 2), np.nan, np.float32))), r"a\.npy in .* not finite"),
    "latent deviation": (folder_with(a_npy=npy(np.full((8, 2, 2), -1, np.float32))), r"deviations below zero"),
    "mixed latents": (
        folder_with(a_npy=npy(np.ones((8, 2, 2), np.float32)), b_npy=npy(np.ones((8, 4, 2), np.float32))),
        r"b\.npy in .* is 4x2, other latents are 2x2",
    ),
    "cut npz": (truncated_npz, r"made\.npz is not a whole \.npz"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_data_is_one_clear_line(tmp_path: Path, fault: str) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(RequestError, match=message) as error:
        read_all(make(tmp_path))
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def read_all(path: Path) -> np.ndarray:
    dataset = open_dataset(path)
    return dataset.stored(range(len(dataset)))
