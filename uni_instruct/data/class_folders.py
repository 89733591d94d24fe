"""Classes by folders: what the folders of a tree of images mean, in a folder and in a zip alike."""

import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from uni_instruct.data.storage import Store, is_dropping, natural_order
from uni_instruct.errors import FileFormatError

# Parts of a data set, which no one trains to tell apart.
_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "holdout"})
_SHARD, _NUMBERED = re.compile(r"[0-9]{5}"), re.compile(r"(?:img|img-mean-std-)?([0-9]{5,})(?:\.\w+)?")


class FolderClasses(NamedTuple):
    """The classes' names and int64 labels [N]; ((), None) where folders are none, and the reason where it is not plain."""

    names: tuple[str, ...]
    class_ids: np.ndarray | None
    note: str = ""


def folder_classes(store: Store, files: list[str]) -> FolderClasses:
    """Classes from the first part of each name, below what holds everything (a folder that was zipped as a whole).

    Raises FileFormatError where the folders look like parts of a data set (train, test); and in a folder on disk where images
    lie beside class folders, or a class folder has none.
    """
    on_disk = store.path.is_dir()
    root, inner = _inside_wrappers(files, on_disk)
    firsts = {name.partition("/")[0] for name in inner if "/" in name}
    loose = next((name for name in inner if "/" not in name), None)
    if not firsts:
        return FolderClasses((), None)
    if loose is not None and on_disk:
        raise FileFormatError(
            f"{store.path / root} has images both in class folders and beside them ({loose})",
            remedy="put every image into a class folder, or none",
        )
    if loose is not None:
        return FolderClasses((), None, f"images lie in folders and beside them ({loose}): read without classes")
    if len(firsts) > 1 and {first.lower() for first in firsts} <= _SPLITS:
        raise _splits(store, root, sorted(firsts))
    if all(map(_is_in_shard, inner)):
        return FolderClasses(
            (), None, "folders are numbered with their images: read without classes" if len(firsts) > 1 else ""
        )
    names = tuple(sorted(firsts, key=natural_order))
    if on_disk:
        _check_all_filled(store.path / root, names)
    ids = {name: index for index, name in enumerate(names)}
    return FolderClasses(names, np.array([ids[name.partition("/")[0]] for name in inner], dtype=np.int64))


def _inside_wrappers(files: list[str], on_disk: bool) -> tuple[str, list[str]]:
    """The folders that hold everything, 'a/b/', and the names within them."""
    root, inner = "", files
    while True:
        first = inner[0].partition("/")[0]
        if not all(name.startswith(f"{first}/") for name in inner):
            return root, inner
        deeper = [name[len(first) + 1 :] for name in inner]
        # A single folder of images on disk is a class by its name; in a zip it is what was zipped. With folders in it,
        # it is what holds the classes.
        if on_disk and first.lower() not in _SPLITS and not any("/" in name for name in deeper):
            return root, inner
        root, inner = f"{root}{first}/", deeper


def _is_in_shard(name: str) -> bool:
    """Whether a name is one of EDM's (00003/img00003004.png) or FFHQ's (03000/03004.png): a thousand files to a folder."""
    folder, _, base = name.partition("/")
    number = _NUMBERED.fullmatch(base)
    if not number or not _SHARD.fullmatch(folder):
        return False
    thousand = int(number[1]) // 1000
    return int(folder) in (thousand, 1000 * thousand)


def _splits(store: Store, root: str, found: list[str]) -> FileFormatError:
    place = store.path / root
    remedy = f"give one of them ({place / found[0]}), or all with commas between; a dataset.json says that they are classes"
    if not store.path.is_dir():
        remedy = "unpack it and give one of the folders, or all with commas between; a dataset.json says that they are classes"
    return FileFormatError(f"{place} has folders {', '.join(found)}: parts of a data set, and no classes", remedy=remedy)


def _check_all_filled(folder: Path, names: tuple[str, ...]) -> None:
    there = (entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())
    folders = {unicodedata.normalize("NFC", name) for name in there if not is_dropping(f"{name}/")}
    empty = sorted(folders - set(names))
    if empty:
        raise FileFormatError(f"class folder {empty[0]} in {folder} has no images", remedy="fill it or remove it")
