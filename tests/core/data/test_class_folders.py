"""Which folders are classes, which are parts of a data set are none, however they are called; what makes no class is said."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders.data_sets import png, zip_of
from uni_instruct.data import check_data, open_dataset
from uni_instruct.errors import FileFormatError

Files = dict[str, bytes]
ONE, TWO, THREE = (png(np.full((4, 4), level, np.uint8)) for level in (1, 2, 3))
HEIC = b"\0\0\0\x18ftypheic" + bytes(12)


def in_folder(path: Path, files: Files) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def in_zip(path: Path, files: Files) -> Path:
    return zip_of(path.with_suffix(".zip"), files)


PLACES = pytest.mark.parametrize("place", [in_folder, in_zip])
Place = Callable[[Path, Files], Path]
PARTS = [
    ("train2017", "val2017"),
    ("trainA", "trainB", "testA", "testB"),
    ("train_images", "test_images"),
    ("images-train", "images-val"),
    ("Train Set", "Test Set"),
    ("train", "test", "extra"),
    ("train", "unlabeled"),
    ("train", "test", "Pictures of mine"),
    ("train1", "train2"),
    ("evaluation", "training"),
]


@PLACES
@pytest.mark.parametrize("parts", PARTS, ids=", ".join)
def test_parts_of_a_data_set_are_no_classes_whatever_they_are_called(
    tmp_path: Path, place: Place, parts: tuple[str, ...]
) -> None:
    path = place(tmp_path / "x", {f"{part}/{number}.png": ONE for number, part in enumerate(parts)})
    with pytest.raises(
        FileFormatError, match=f"has folders {', '.join(sorted(parts))}, which are parts of a data set, not classes"
    ):
        open_dataset(path)
    assert "parts of a data set" in check_data(str(path)).wrong[0].problem
    if path.is_dir():
        assert len(open_dataset(path / parts[0])) == 1  # as the remedy says


@PLACES
@pytest.mark.parametrize(
    "names", [("train", "bus", "plane"), ("trains", "tests"), ("Devon", "Valencia"), ("latest", "contest")]
)
def test_classes_that_are_called_much_like_parts_are_classes(tmp_path: Path, place: Place, names: tuple[str, ...]) -> None:
    dataset = open_dataset(place(tmp_path / "x", {f"{name}/{number}.png": ONE for number, name in enumerate(names)}))
    assert (set(dataset.class_names), dataset.note) == (set(names), "")


def test_two_folders_of_one_name_in_two_forms_of_unicode_are_one_class(tmp_path: Path) -> None:
    """Also where both hold a file of one name, so that neither can be called by its composed form."""
    composed, apart = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")
    dataset = open_dataset(in_folder(tmp_path, {f"{composed}/1.png": ONE, f"{apart}/1.png": TWO, "dog/1.png": THREE}))
    assert dataset.class_names == (composed, "dog")
    assert dataset.labels is not None
    assert sorted(zip(dataset.images(range(3))[:, 0, 0, 0], dataset.labels, strict=True)) == [(1, 0), (2, 0), (3, 1)]


@PLACES
def test_folders_within_a_class_are_said_to_be_none(tmp_path: Path, place: Place) -> None:
    files = {"cat/train/1.png": ONE, "cat/test/2.png": TWO, "dog/in/3.png": THREE, "owl/4.png": ONE, "owl/old/5.png": TWO}
    dataset = open_dataset(place(tmp_path / "x", files))
    assert dataset.class_names == ("cat", "dog", "owl")
    assert dataset.note == "3 folders (cat/test, cat/train, owl/old) within class folders: not classes of their own"


@PLACES
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "labels.txt", "train.csv", "list_annotations.xml"])
def test_labels_in_another_form_are_said_to_be_unread(tmp_path: Path, place: Place, name: str) -> None:
    files = {"1.png": ONE, "2.png": TWO, name: b"1.png,0\n2.png,1\n"}
    note = f"1 file ({name}) skipped: not images"
    hint = f"; classes are read from dataset.json or folders, not from {name}"
    assert open_dataset(place(tmp_path / "x", files)).note == note + hint
    files["dataset.json"] = b'{"labels": null}'
    assert open_dataset(place(tmp_path / "y", files)).note == note


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "has no images; add images or remove the folder"),
        ({"a.heic": HEIC, "b.heic": HEIC}, r"has no images but 2 files \(dog/a.heic, dog/b.heic\); save HEIC as JPEG or PNG"),
        (
            {"a.svg": b"<svg/>"},
            r"has no images but 1 file \(dog/a.svg\); add images that are supported, such as PNG, or remove the folder",
        ),
    ],
)
def test_a_class_folder_without_images_says_what_it_holds(tmp_path: Path, files: Files, line: str) -> None:
    in_folder(tmp_path, {"cat/1.png": ONE, **{f"dog/{name}": content for name, content in files.items()}})
    (tmp_path / "dog").mkdir(exist_ok=True)
    with pytest.raises(FileFormatError, match=f"class folder dog in .* {line}"):
        open_dataset(tmp_path)
