"""Zips and tars as other programs write them: nothing is lost in silence, and what cannot be read is said for the whole."""

import io
import stat
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest

from builders.data_sets import png, zip_of
from uni_instruct.data import Dataset, check_data, open_dataset
from uni_instruct.errors import FileFormatError

PICTURES = [png(np.full((4, 4), level, np.uint8)) for level in range(4)]
CLASSES = {"cat/1.png": PICTURES[0], "cat/2.png": PICTURES[1], "dog/3.png": PICTURES[2]}
LABELS = b'{"labels": [["a.png", 1], ["b.png", 0]], "class_names": ["cat", "dog"]}'


def tar_of(path: Path, members: dict[str, bytes], links: dict[str, tuple[bytes, str]] | None = None) -> Path:
    """links: name -> the kind of link and where it leads."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        for name, (kind, target) in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry)
    return path


def two_tars(folder: Path, members: dict[str, bytes]) -> Path:
    """The members, the second half of them in the second of two tars."""
    folder.mkdir()
    names = sorted(members)
    half = (len(names) + 1) // 2
    for number, part in enumerate((names[:half], names[half:])):
        tar_of(folder / f"{number}.tar", {name: members[name] for name in part})
    return folder


def named(dataset: Dataset) -> list[str]:
    """Each image's level and class's name."""
    classes = [""] * len(dataset) if dataset.labels is None else [dataset.class_names[k] for k in dataset.labels]
    levels = dataset.images(range(len(dataset)))[:, 0, 0, 0]
    return sorted(f"{level} {name}".strip() for level, name in zip(levels, classes, strict=True))


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("../up/1.png", "up"),
        ("up/../1/1.png", "1"),
        ("/data/up/1.png", "data"),
        ("./up//1.png", "up"),
        ("up/./1.png", "up"),
        ("..\\up\\1.png", "up"),
    ],
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_that_leads_out_of_the_archive_is_one_within_it(tmp_path: Path, kind: str, name: str, class_name: str) -> None:
    """'..' is no hidden folder, whose images would be left out without a word."""
    members = {name: PICTURES[1], "dog/2.png": PICTURES[2]}
    path = zip_of(tmp_path / "x.zip", members) if kind == "zip" else tar_of(tmp_path / "x.tar", members)
    dataset = open_dataset(path)
    assert (named(dataset), dataset.note) == ([f"1 {class_name}", "2 dog"], "")


@pytest.mark.parametrize("name", ["caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9"), "\u732b", "\U0001f408"])
def test_names_in_utf_8_without_its_flag_are_read_as_macos_writes_them(tmp_path: Path, name: str) -> None:
    raw = name.encode()
    zip_of(tmp_path / "x.zip", {f"{'X' * len(raw)}/1.png": PICTURES[1], "dog/2.png": PICTURES[2]})
    (tmp_path / "x.zip").write_bytes((tmp_path / "x.zip").read_bytes().replace(b"X" * len(raw), raw))
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert name not in archive.namelist()[0]  # which is what zipfile makes of it
    assert set(open_dataset(tmp_path / "x.zip").class_names) == {unicodedata.normalize("NFC", name), "dog"}


def test_names_in_code_page_437_stay_what_they_are(tmp_path: Path) -> None:
    zip_of(tmp_path / "x.zip", {"cafX/1.png": PICTURES[1], "dog/2.png": PICTURES[2]})
    (tmp_path / "x.zip").write_bytes((tmp_path / "x.zip").read_bytes().replace(b"cafX", "caf\u00e9".encode("cp437")))
    assert open_dataset(tmp_path / "x.zip").class_names == ("caf\u00e9", "dog")


def test_links_in_a_zip_are_passed_over_and_counted(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    zip_of(tmp_path / "x.zip", CLASSES)
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.writestr(link, "1.png")
    dataset = open_dataset(tmp_path / "x.zip")
    assert (len(dataset), dataset.note) == (3, "1 file (cat/link.png) skipped: not images")
    assert check_data(str(tmp_path / "x.zip")).wrong == ()


def test_links_in_a_tar_are_passed_over_and_counted(tmp_path: Path) -> None:
    links = {"cat/hard.png": (tarfile.LNKTYPE, "cat/1.png"), "cat/soft.png": (tarfile.SYMTYPE, "1.png")}
    dataset = open_dataset(tar_of(tmp_path / "x.tar", CLASSES, links))
    said = "1 file (cat/soft.png) skipped: not images; 1 name (cat/hard.png) skipped: already present"
    assert (len(dataset), dataset.note) == (3, said)


def encrypted(path: Path) -> None:
    """Sets the flag of every entry, in its header and in the directory."""
    content = bytearray(path.read_bytes())
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = content.find(signature)
        while place >= 0:
            content[place + at] |= 1
            place = content.find(signature, place + 4)
    path.write_bytes(content)


def test_a_zip_that_cannot_be_unpacked_is_refused_as_a_whole(tmp_path: Path) -> None:
    """Replacing or removing one file would help nobody."""
    path = zip_of(tmp_path / "x.zip", CLASSES)
    encrypted(path)
    with pytest.raises(FileFormatError, match=r"x\.zip is encrypted; unpack it with its password and give the folder$"):
        open_dataset(path)
    assert [one.problem for one in check_data(str(path)).wrong] == [f"{path} is encrypted"]
    for method, name in ((zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "LZMA")):
        with zipfile.ZipFile(path, "w", method) as archive:
            for file, content in CLASSES.items():
                archive.writestr(file, content)
        with pytest.raises(
            FileFormatError, match=rf"is compressed by {name}, which is not supported; unpack it and give the folder$"
        ):
            open_dataset(path)


def test_a_folder_of_a_zip_without_images_is_named(tmp_path: Path) -> None:
    """On disk it is refused; a zip may be of somebody else."""
    files = {**CLASSES, "owl/": b"", "ape/notes.txt": b"x", "__MACOSX/": b"", "cat/deeper/": b""}
    dataset = open_dataset(zip_of(tmp_path / "x.zip", files))
    assert dataset.class_names == ("cat", "dog")
    assert dataset.note == "2 folders (ape, owl) without images: not classes; 1 file (ape/notes.txt) skipped: not images"


WITH_CLASSES = {
    "class folders": CLASSES,
    "class folders in one": {f"./pets/{name}": content for name, content in CLASSES.items()},
    "dataset.json": {"a.png": PICTURES[2], "b.png": PICTURES[0], "dataset.json": LABELS},
    "KEY.cls": {"0.png": PICTURES[0], "0.cls": b"0", "1.png": PICTURES[2], "1.cls": b"1\n"},
    "keys with dots": {"0.v.png": PICTURES[0], "0.v.cls": b"0", "1.v.png": PICTURES[2], "1.v.cls": b"1"},
    "several members a key": {"0.image.png": PICTURES[0], "0.cls": b"0", "1.image.png": PICTURES[2], "1.cls": b"1"},
    "capitals": {"0.PNG": PICTURES[0], "0.CLS": b"0", "1.PNG": PICTURES[2], "1.CLS": b"1"},
}


@pytest.mark.parametrize("kind", WITH_CLASSES)
def test_classes_of_a_tar_are_found_wherever_they_stand(tmp_path: Path, kind: str) -> None:
    dataset = open_dataset(tar_of(tmp_path / "x.tar", WITH_CLASSES[kind]))
    assert dataset.labels is not None
    assert (dataset.num_classes, dataset.note) == (2, "")
    cats = dataset.images(np.flatnonzero(dataset.labels == 0))[:, 0, 0, 0]
    assert sorted(cats) == ([0, 1] if "class folders" in kind else [0])
    if "dataset" not in kind:
        folder = open_dataset(two_tars(tmp_path / "tars", WITH_CLASSES[kind]))
        assert folder.class_names == dataset.class_names
        assert named(folder) == named(dataset)


def test_classes_that_stand_beside_no_image_are_not_lost(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"x\.tar has no 0\.cls; give every image a class, or none"):
        open_dataset(tar_of(tmp_path / "x.tar", {"0.png": PICTURES[0], "0_label.cls": b"0"}))


def test_what_a_tar_says_in_other_ways_is_said_to_be_unread(tmp_path: Path) -> None:
    members = {"0.png": PICTURES[0], "0.json": b'{"label": 0}', "1.png": PICTURES[1], "1.json": b'{"label": 1}'}
    said = "2 files (0.json, 1.json) skipped: classes beside images are read only from .cls"
    assert open_dataset(tar_of(tmp_path / "x.tar", members)).note == said
    members |= {"0.cls": b"1", "1.cls": b"2"}
    assert open_dataset(tar_of(tmp_path / "x.tar", members)).note == "labels begin at 1: class 0 has no image"


def test_parts_of_a_data_set_in_a_tar_are_no_classes(tmp_path: Path) -> None:
    members = {"train/1.png": PICTURES[0], "test/2.png": PICTURES[1]}
    for source in (tar_of(tmp_path / "x.tar", members), two_tars(tmp_path / "tars", members)):
        with pytest.raises(
            FileFormatError, match="has folders test, train, which are parts of a data set, not classes; unpack it and"
        ):
            open_dataset(source)
        assert "parts of a data set" in check_data(str(source)).wrong[0].problem


def test_what_lies_beside_tars_is_counted(tmp_path: Path) -> None:
    folder = two_tars(tmp_path / "tars", CLASSES)
    (folder / "owl").mkdir()
    (folder / "owl" / "1.png").write_bytes(PICTURES[0])
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "1.tar").rename(folder / "1.TAR")
    dataset = open_dataset(folder)
    assert (len(dataset), dataset.note) == (3, "1 file (owl/1.png) skipped: not tars")
