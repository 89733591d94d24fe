"""Tar archives of images, as webdataset writes and reads them: one tar, or a folder of tars that is one data set.

The class of an image is in a member of the same key, KEY.cls. Without any such member, a tar is read as a zip is.
"""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np

from uni_instruct.data.dataset import MAX_CLASSES, Dataset, number_names
from uni_instruct.data.file_kinds import DataFiles, ImageForm, content_of, data_files, dataset_of, skipped_note
from uni_instruct.data.ignored_files import is_ignored
from uni_instruct.data.image_files import decode, is_image_file
from uni_instruct.data.labels import META, Description, first_label_note, read_description, read_meta
from uni_instruct.data.storage import UNREADABLE, FolderStore, naturally_sorted, plain_name, reason_of
from uni_instruct.errors import FileFormatError
from uni_instruct.system.file_type import FileType, file_type
from uni_instruct.system.files import JSON_ERRORS
from uni_instruct.system.printable import counted, joined_notes

# The file that `generate` writes beside its tars, and the value in it that distinguishes it from other files of that name.
MANIFEST, LIBRARY = "manifest.json", "uni-instruct"
_CLASS, _ARRAY = ".cls", ".npy"
_CAPTION_SUFFIXES = (".json", ".txt")  # captions and metadata beside each image in webdataset's tars
_REMEDY = "give tars of images, as 'generate --out NAME.wds' writes them"


class TarStore:
    """The members of a tar, or of all tars in a folder as TAR/MEMBER. Only their names and offsets stay in memory."""

    def __init__(self, path: Path):
        self.path = path
        self.repeated: list[str] = []
        self.special_files: list[str] = []
        self.folders: list[str] = []
        self._tars = naturally_sorted(filter(_is_called_tar, os.listdir(path))) if path.is_dir() else [""]
        self._places: dict[str, tuple[int, int, int]] = {}  # name -> (index of the tar, offset, size)
        for number, tar in enumerate(self._tars):
            self._index(number, path / tar if tar else path)

    def names(self) -> list[str]:
        """Every member that is a file."""
        return list(self._places)

    def read(self, name: str) -> bytes:
        """The member's bytes."""
        number, start, size = self._places[name]
        tar = self.path / self._tars[number] if self._tars[number] else self.path
        with tar.open("rb") as file:
            content = os.pread(file.fileno(), size, start)
        if len(content) < size:
            raise EOFError(f"{tar} ends within {name}")
        return content

    def head(self, name: str, size: int) -> bytes:
        """The member's first bytes."""
        return self.read(name)[:size]

    def _index(self, number: int, tar: Path) -> None:
        prefix = f"{tar.stem}/" if self._tars[number] else ""
        try:
            with tarfile.open(tar, "r:") as archive:
                for member in archive:
                    self._add(number, prefix, member)
                    archive.members = []  # type: ignore[attr-defined]  # else tarfile keeps a kilobyte for each
        except (*UNREADABLE, tarfile.TarError) as error:
            packed = "it is compressed" if tar.open("rb").read(2) == b"\x1f\x8b" else reason_of(error)
            raise FileFormatError(f"{tar} is not a whole tar: {packed}", remedy="unpack or copy it again") from error

    def _add(self, number: int, prefix: str, member: tarfile.TarInfo) -> None:
        inner = plain_name(member.name)
        name = prefix + inner
        if is_ignored(f"{inner}/" if member.isdir() else inner):
            return
        if member.isdir():
            self.folders.append(f"{name}/")
        elif member.islnk() or name in self._places:
            self.repeated.append(name)  # a hard link: tar stores a file with several names once
        elif not member.isfile():
            self.special_files.append(name)
        if member.isfile():
            self._places[name] = number, member.offset_data, member.size


def _is_called_tar(name: str) -> bool:
    return os.path.splitext(name)[1].lower() == ".tar" and not name.startswith(".")


def is_tar(path: Path) -> bool:
    """Whether a file is named .tar, or is an uncompressed tar."""
    return _is_called_tar(path.name) or (
        path.is_file() and file_type(path) is FileType.TAR and path.suffix not in (".gz", ".tgz")
    )


def has_tars(folder: Path) -> bool:
    """Whether a folder holds tars and no images beside them."""
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    return any(map(_is_called_tar, names)) and not any(map(is_image_file, names))


class TarDataset(TypedDict, total=False):
    """The manifest's description of the images."""

    name: str
    image_shape: list[int]
    num_classes: int
    class_names: list[str]
    licence: str


class TarFile(TypedDict):
    """The manifest's entry for a tar: its size and hash show whether it is complete."""

    name: str
    images: int
    bytes: int
    sha256: str


class TarManifest(TypedDict, total=False):
    """The manifest that `generate` writes beside its tars: the parts that are needed to read the data."""

    library: str
    dataset: TarDataset
    files: list[TarFile]


def open_tars(path: Path, form: ImageForm) -> Dataset:
    """Open a tar, or a folder of tars. Classes are in members beside the images, in a `dataset.json`, or are folders.

    Raises FileFormatError if a tar is corrupt or missing, if there are no images, or if only some of them have a class.
    """
    manifest = _manifest(path)
    store = TarStore(path)
    found = tar_images(store)
    shape = manifest.get("dataset", {}).get("image_shape")
    content = content_of(store, found, form, every_header=False, stated=shape[0] if shape else None)
    if class_ids_of(store, found.files) is None and not manifest:
        description = _by_tree(store, found.files)
    else:
        description = _by_members(store, found.files, manifest)
    beside = [] if manifest else _beside_tars(store)
    note = f"{counted(beside, 'file')} skipped: not tars" if beside else ""
    return dataset_of(content, description, joined_notes(skipped_note(found, store, description.labels is None), note))


def _by_members(store: TarStore, files: list[str], manifest: TarManifest) -> Description:
    """The description by the .cls members beside the images and by the manifest of `generate`."""
    described = manifest.get("dataset", {})
    labels = class_ids_of(store, files)
    count = max(int(described.get("num_classes", 0)), 0 if labels is None else int(labels.max()) + 1)
    names = described.get("class_names", [])
    return Description(
        name=str(described.get("name", store.path.stem)),
        labels=labels,
        num_classes=0 if labels is None else count,
        class_names=() if labels is None else tuple(names) if len(names) == count else number_names(count),
        licence=str(described.get("licence", "unknown")),
        source=str(store.path),
        note="" if labels is None or manifest else first_label_note(labels),
    )


def _by_tree(store: TarStore, files: list[str]) -> Description:
    """The description by a `dataset.json` in the tars, or by folders: for several tars, the folders within each."""
    meta = read_meta(store, store.names())
    if meta.has_labels or not store.path.is_dir():
        description = read_description(store, files, meta)
    else:
        description = read_description(_AsOneTree(store), [_within_tar(name) for name in files], meta)
    captions = _captions(store, files)
    if not captions or description.labels is not None or meta.has_labels:
        return description
    note = f"{counted(captions, 'file')} skipped: classes beside images are read only from {_CLASS}"
    return replace(description, note=joined_notes(description.note, note))


class _AsOneTree(TarStore):
    """The tars of a folder as if they were one. Names are those within each tar."""

    def __init__(self, tars: TarStore):
        self.path = tars.path
        self.folders = [_within_tar(name) for name in tars.folders]
        self._names = [_within_tar(name) for name in tars.names()]

    def names(self) -> list[str]:
        """Every member, even if two tars have one of the same name."""
        return self._names


def _within_tar(name: str) -> str:
    return name.partition("/")[2]


def _beside_tars(store: TarStore) -> list[str]:
    """The files in a folder of tars that are not tars."""
    if not store.path.is_dir():
        return []
    names = FolderStore(store.path).names()
    return naturally_sorted(name for name in names if "/" in name or not _is_called_tar(name))


def tar_images(store: TarStore) -> DataFiles:
    """The images of tars, without the classes and captions beside them. Raises FileFormatError if there are none."""
    found = data_files(store, [name for name in store.names() if not _is_class(name)], _REMEDY)
    captions = set(_captions(store, found.files))
    return found._replace(skipped=[name for name in found.skipped if name not in captions])


def has_class_members(store: TarStore) -> bool:
    """Whether classes are in members beside the images, KEY.cls. Then nothing else states them."""
    return any(map(_is_class, store.names()))


def _captions(store: TarStore, files: list[str]) -> list[str]:
    """Captions and metadata: members with the key of an image."""
    keys = {_key(name) for name in files}
    captions = [name for name in store.names() if name.endswith(_CAPTION_SUFFIXES) and name.rpartition("/")[2] != META]
    return [name for name in captions if _key(name) in keys]


def image_members(names: Sequence[str]) -> list[str]:
    """The names of images, or of arrays in their place, in natural order."""
    return naturally_sorted(name for name in names if is_image_file(name) or name.endswith(_ARRAY))


def decoded_member(store: TarStore, name: str) -> np.ndarray:
    """The pixels of an image, uint8 [H, W, C]; an array as it is stored."""
    if name.endswith(_ARRAY):
        array: np.ndarray = np.load(io.BytesIO(store.read(name)), allow_pickle=False)
        return array
    return decode(store, name)


def class_ids_of(store: TarStore, names: Sequence[str]) -> np.ndarray | None:
    """The class of each image, from the member beside it: int64 [N]; None if no image has one.

    Raises FileFormatError if only some images have one, or if it is not a class id.
    """
    classes = {name[: -len(_CLASS)]: name for name in store.names() if _is_class(name)}
    if not classes:
        return None
    beside = [classes.get(name.rpartition(".")[0]) or classes.get(_key(name)) for name in names]
    if None in beside:
        missing = f"{_key(names[beside.index(None)])}{_CLASS}"
        raise FileFormatError(f"{store.path} has no {missing}", remedy="give every image a class, or none")
    ids = [_class_id(store, name) for name in beside if name is not None]
    return np.array(ids, dtype=np.int64)


def _key(name: str) -> str:
    """webdataset's key, which the members of one sample share: the name up to the first dot of its base name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _is_class(name: str) -> bool:
    return name[-len(_CLASS) :].lower() == _CLASS


def _class_id(store: TarStore, name: str) -> int:
    text = store.read(name).decode("utf-8", "replace").strip()
    if not text.isdecimal() or len(text) > 9 or int(text) >= MAX_CLASSES:
        raise FileFormatError(
            f"{name} in {store.path} holds {text[:20]!r}, not a class id", remedy=f"write class ids below {MAX_CLASSES}"
        )
    return int(text)


def _manifest(path: Path) -> TarManifest:
    """The manifest that `generate` wrote beside its tars, or {}. Raises FileFormatError if a tar is missing or too short."""
    file = path / MANIFEST
    if not path.is_dir() or not file.is_file():
        return {}
    try:
        found: TarManifest = json.loads(file.read_text())
    except JSON_ERRORS as error:
        raise FileFormatError(f"{file} is damaged: {reason_of(error)}", remedy="copy it again") from error
    if not isinstance(found, dict) or found.get("library") != LIBRARY:
        return {}
    for tar in found["files"]:
        there = (path / tar["name"]).stat().st_size if (path / tar["name"]).is_file() else 0
        if there != tar["bytes"]:
            raise FileFormatError(
                f"{path / tar['name']} has {there} bytes, {MANIFEST} says {tar['bytes']}", remedy="copy or make it again"
            )
    return found
