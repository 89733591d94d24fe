"""Decide which folders of a tree of images are classes, on disk, in zips and in tars alike."""

import re
import unicodedata
from collections import Counter
from typing import NamedTuple

import numpy as np

from uni_instruct.data.ignored_files import is_ignored
from uni_instruct.data.storage import FolderStore, Store, natural_order
from uni_instruct.errors import FileFormatError
from uni_instruct.system.file_type import HEAD, SAVE_HEIC, begins_as_heic
from uni_instruct.system.printable import counted, joined_notes

# Names of parts of a data set, which are not classes: train, Test, val2017 (COCO), trainA (CycleGAN), images_test.
_SPLIT = re.compile(
    r"(?:(?:images?|imgs|data)[-_ ]?)?(train|test|val|dev|eval|holdout)(?:ing|id|idation|uation)?"
    r"(?:[-_ ]?(?:set|split|images?|imgs|data|[ab]|\d{1,4}))?",
    re.IGNORECASE,
)
_BESIDE_SPLITS = frozenset({"extra", "unlabeled", "unlabelled", "unsup"})  # of STL-10, SVHN and others, beside train and test
_SHARD, _NUMBERED = re.compile(r"[0-9]{5}"), re.compile(r"(?:img|img-mean-std-)?([0-9]{5,})(?:\.\w+)?")


class FolderClasses(NamedTuple):
    """The class names and int64 labels [N]; ((), None) if the folders are not classes. note: the reason, if not obvious."""

    names: tuple[str, ...]
    class_ids: np.ndarray | None
    note: str = ""


def folder_classes(store: Store, files: list[str]) -> FolderClasses:
    """Take each image's class from the first folder of its name, inside folders that hold everything (such as a zipped folder).

    Raises FileFormatError if the folders look like parts of a data set (train, test). On disk also if images are beside class
    folders, or if a class folder has no images.
    """
    on_disk = isinstance(store, FolderStore)
    root, inner = _common_root(files, on_disk)
    # Names that differ only in Unicode's form are one class. A folder on disk may hold both forms.
    written = {name.partition("/")[0] for name in inner if "/" in name}
    class_of = {first: unicodedata.normalize("NFC", first) for first in written}
    firsts = set(class_of.values())
    loose = next((name for name in inner if "/" not in name), None)
    if not firsts:
        return FolderClasses((), None)
    if loose is not None and on_disk:
        raise FileFormatError(
            f"{store.path / root} has images both in class folders and beside them ({loose})",
            remedy="put every image into a class folder, or none",
        )
    if loose is not None:
        return FolderClasses((), None, f"images are in folders and beside them ({loose}): read without classes")
    if _are_splits(firsts):
        raise _splits_error(store, root, sorted(firsts))
    if all(map(_is_in_shard, inner)):
        return FolderClasses(
            (), None, "folders are numbered with their images: read without classes" if len(firsts) > 1 else ""
        )
    names = tuple(sorted(firsts, key=natural_order))
    empty = _without_images(store, root, names)
    if empty and on_disk:
        raise _empty_class_error(store, root, empty[0])
    ids = {name: index for index, name in enumerate(names)}
    class_ids = np.array([ids[class_of[name.partition("/")[0]]] for name in inner], dtype=np.int64)
    note = f"{counted(empty, 'folder')} without images: not classes" if empty else ""
    return FolderClasses(names, class_ids, joined_notes(note, _deeper_note(inner)))


def _common_root(files: list[str], on_disk: bool) -> tuple[str, list[str]]:
    """The path of the folders that hold everything ('' or 'a/b/'), and the file names inside it."""
    root, inner = "", files
    while True:
        first = inner[0].partition("/")[0]
        if not all(name.startswith(f"{first}/") for name in inner):
            return root, inner
        deeper = [name[len(first) + 1 :] for name in inner]
        # A single folder of images is a class on disk, named after the folder; in a zip it is what was zipped. If it has
        # sub-folders, they are the classes.
        if on_disk and not _SPLIT.fullmatch(first) and not any("/" in name for name in deeper):
            return root, inner
        root, inner = f"{root}{first}/", deeper


def _are_splits(folders: set[str]) -> bool:
    """Whether folders are parts of a data set: all of them are, or 'train' and another part are among them."""
    found = {folder: match[1].lower() for folder in folders if (match := _SPLIT.fullmatch(folder))}
    rest = {folder.lower() for folder in folders - found.keys()}
    several = "train" in found.values() and len(set(found.values())) > 1
    return len(folders) > 1 and (several or (bool(found) and rest <= _BESIDE_SPLITS))


def _deeper_note(inner: list[str]) -> str:
    """A note on class folders that hold several folders of images: those are not classes of their own. '' if there are none."""
    folders = {name.rpartition("/")[0] for name in inner}
    classes = Counter(folder.partition("/")[0] for folder in folders)
    deeper = [folder for folder in folders if "/" in folder and classes[folder.partition("/")[0]] > 1]
    shown = counted(sorted(deeper, key=natural_order), "folder")
    return f"{shown} within class folders: not classes of their own" if deeper else ""


def _is_in_shard(name: str) -> bool:
    """Whether a name is numbered as EDM's (00003/img00003004.png) or FFHQ's (03000/03004.png): a thousand files per folder."""
    folder, _, base = name.partition("/")
    number = _NUMBERED.fullmatch(base)
    if not number or not _SHARD.fullmatch(folder):
        return False
    thousand = int(number[1]) // 1000
    return int(folder) in (thousand, 1000 * thousand)


def _splits_error(store: Store, root: str, found: list[str]) -> FileFormatError:
    place = store.path / root
    one = f"give one of them ({place / found[0]})"
    if not isinstance(store, FolderStore):
        one = "unpack it and give one of the folders"
    remedy = f"{one}, or several separated by commas; if they are classes, add a dataset.json with labels"
    return FileFormatError(f"{place} has folders {', '.join(found)}, which are parts of a data set, not classes", remedy=remedy)


def _without_images(store: Store, root: str, names: tuple[str, ...]) -> list[str]:
    """The folders beside the class folders that hold no image, in natural order."""
    if isinstance(store, FolderStore):
        there = [entry.name for entry in (store.path / root).iterdir() if entry.is_dir() and not entry.is_symlink()]
    else:
        beside = (name[len(root) :] for name in [*store.names(), *store.folders] if name.startswith(root))
        there = [name.partition("/")[0] for name in beside if "/" in name]
    folders = {unicodedata.normalize("NFC", name) for name in there if not is_ignored(f"{name}/")}
    return sorted(folders - set(names), key=natural_order)


def _empty_class_error(store: Store, root: str, name: str) -> FileFormatError:
    """The error for a class folder on disk without images. It names the files that are in the folder."""
    held = [other for other in store.names() if other.startswith(f"{root}{name}/")]
    remedy = "add images or remove the folder"
    if held:
        heic = begins_as_heic(store.head(held[0], HEAD))
        remedy = SAVE_HEIC if heic else "add images that are supported, such as PNG, or remove the folder"
    there = f" but {counted(held, 'file')}" if held else ""
    return FileFormatError(f"class folder {name} in {store.path / root} has no images{there}", remedy=remedy)
