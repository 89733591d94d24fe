"""Read `dataset.json`: labels, number and names of classes, name and licence of the files beside and below it."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from uni_instruct.data.class_folders import FolderClasses, folder_classes
from uni_instruct.data.dataset import MAX_CLASSES, number_names
from uni_instruct.data.storage import UNREADABLE, Store, name_in_store, plain_name, reason_of
from uni_instruct.errors import FileFormatError
from uni_instruct.system.printable import counted, joined_notes

META = "dataset.json"
# The file that `generate` writes beside its images: the seeds in order, the request, and for a folder each file's hash.
RECORD = "samples.json"


class LabelMismatch(NamedTuple):
    """A file whose label is wrong. problem: words that follow the file's name."""

    file: str
    problem: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The classes of the files. class_ids: int64 [N], or None. note: for example why labels give no classes."""

    class_ids: np.ndarray | None
    num_classes: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Description:
    """The fields of a Dataset that `dataset.json` or the folders give; see Dataset."""

    name: str
    labels: np.ndarray | None
    num_classes: int
    class_names: tuple[str, ...]
    licence: str
    source: str
    note: str


@dataclass(frozen=True)
class Meta:
    """A `dataset.json`. content: its JSON object. folder: where it is, '' or 'a/b/'. found: whether the file exists."""

    content: dict[str, object] = field(default_factory=dict)
    folder: str = ""
    found: bool = False

    @property
    def has_labels(self) -> bool:
        """Whether it states the classes. `null` states that there are none."""
        return "labels" in self.content


def read_description(store: Store, files: list[str], meta: Meta) -> Description:
    """Read what `dataset.json` says about the files. If it does not state the classes, the folders are the classes.

    Raises FileFormatError if it does not match the files, or as `folder_classes` does.
    """
    labels = read_labels(store, files, meta)
    by_folder = FolderClasses((), None) if meta.has_labels else folder_classes(store, files)
    num_classes = labels.num_classes or len(by_folder.names)
    named = _named_classes(meta.content.get("class_names"))
    class_names = by_folder.names if named is None else named
    # EDM's tools write no class names, and other tools write them in many forms.
    unfit = named is not None and num_classes and len(named) != num_classes
    unread = named is None and num_classes and meta.content.get("class_names") is not None
    # Resolved, because '.' has no name. The suffix of a file is not part of its name.
    own_name = store.path.resolve().name if store.path.is_dir() else store.path.stem
    silent = f"{META} says nothing about labels" if meta.found and not meta.has_labels else ""
    return Description(
        name=str(meta.content.get("name") or own_name),
        labels=labels.class_ids if by_folder.class_ids is None else by_folder.class_ids,
        num_classes=num_classes,
        class_names=class_names if len(class_names) == num_classes else by_folder.names or number_names(num_classes),
        licence=str(meta.content.get("licence") or "unknown"),
        source=str(store.path),
        note=joined_notes(
            labels.note,
            silent,
            by_folder.note,
            f"{META} has {len(class_names)} class names for {num_classes} classes: ignored" if unfit else "",
            f"class_names in {META} is not a list of names: ignored" if unread else "",
        ),
    )


def _named_classes(named: object) -> tuple[str, ...] | None:
    """Class names in the order of their ids, from a list, {id: name} or {name: id}. None for anything else."""
    if isinstance(named, dict) and all(type(number) is int for number in named.values()):
        named = {str(number): name for name, number in named.items()}
    if isinstance(named, dict):
        named = [named.get(str(number)) for number in range(len(named))]
    if not isinstance(named, list) or not all(type(name) in (str, int, float) for name in named):
        return None
    return tuple(str(name) for name in named)


def read_meta(store: Store, names: list[str]) -> Meta:
    """The topmost `dataset.json` of the names. Raises FileFormatError if it is not a JSON object, or two are at one depth."""
    found = sorted((name for name in names if name.rpartition("/")[2] == META), key=lambda name: (name.count("/"), name))
    if not found:
        return Meta()
    name = found[0]
    if len(found) > 1 and found[1].count("/") == name.count("/"):
        places = [place.rpartition("/")[0] for place in found[:2]]
        raise FileFormatError(
            f"{store.path} holds several data sets ({', '.join(places)}, each with a {META})",
            remedy=f"{'' if store.path.is_dir() else 'unpack it and '}give them one by one, or separated by commas",
        )
    try:
        content = json.loads(store.read(name), object_pairs_hook=_each_key_once)
    except UNREADABLE as error:
        raise FileFormatError(
            f"{META} in {store.path} is not JSON: {reason_of(error)}", remedy="correct it, or prepare it again"
        ) from error
    if not isinstance(content, dict):
        raise FileFormatError(f"{META} in {store.path} is not a JSON object", remedy='write {"labels": [[file, class], ...]}')
    return Meta(content, name.removesuffix(META), found=True)


def _each_key_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object. Raises ValueError if a key occurs twice with different values; the json module would take the last."""
    content: dict[str, object] = {}
    for key, value in pairs:
        if content.setdefault(key, value) != value:
            raise ValueError(f"{key[:40]!r} occurs twice, with different values")
    return content


def read_labels(store: Store, files: list[str], meta: Meta) -> Labels:
    """The files' classes. One-hot vectors are classes; other vectors are not, and the files are read without classes.

    Raises FileFormatError for the first file whose label is missing or wrong.
    """
    stated = stated_classes(store, meta)
    by_file = label_entries(store, meta)
    if by_file is None:
        return Labels(class_ids=None, num_classes=0)
    mismatch = next(label_mismatches(by_file, files, stated), None)
    if mismatch is not None:
        raise FileFormatError(f"{name_in_store(store, mismatch.file)} {mismatch.problem}", remedy=mismatch.remedy)
    # Now all labels are integers, or all are vectors: a label of another kind than the first is a mismatch.
    labels = [by_file[file] for file in files]
    vectors = [label for label in labels if isinstance(label, list)]
    if not vectors:
        class_ids = np.array(labels, dtype=np.int64)
        num_classes = stated or int(class_ids.max()) + 1
        note = joined_notes(first_label_note(class_ids), _absent_note(by_file, files))
        return Labels(class_ids=class_ids, num_classes=num_classes, note=note)
    if not all(map(_is_one_hot, vectors)):
        note = f"labels are vectors of {len(vectors[0])} numbers and not one-hot: read without classes"
        return Labels(class_ids=None, num_classes=0, note=note)
    class_ids = np.array([vector.index(1) for vector in vectors], dtype=np.int64)
    return Labels(class_ids=class_ids, num_classes=stated or len(vectors[0]), note=_absent_note(by_file, files))


def label_entries(store: Store, meta: Meta) -> dict[str, object] | None:
    """The labels in `dataset.json` by file; None if it has none.

    Raises FileFormatError if they are not a list of [file, class], or if a file has two labels.
    """
    entries = meta.content.get("labels")
    if entries is None:
        return None
    by_file: dict[str, object] = {}
    present = set(store.names()) if meta.folder else set[str]()
    for name, label in _pairs(store, entries):
        file = _full_name(name, meta.folder, present)
        if file in by_file and by_file[file] != label:
            raise FileFormatError(
                f"{name_in_store(store, file)} has two labels in {META}, {_shown(by_file[file])} and {_shown(label)}",
                remedy="leave one of them out",
            )
        by_file[file] = label
    return by_file


def stated_classes(store: Store, meta: Meta) -> int:
    """The number of classes that `dataset.json` states, or 0. Raises FileFormatError if it is not a number of classes."""
    stated = meta.content.get("num_classes") or 0
    if type(stated) is not int or not 0 <= stated <= MAX_CLASSES:
        raise FileFormatError(
            f"num_classes {_shown(stated)} in {META} of {store.path} is not a number of classes",
            remedy="leave it out, or write the number",
        )
    return stated


def label_mismatches(by_file: dict[str, object], files: list[str], stated: int) -> Iterator[LabelMismatch]:
    """Yield files whose label is missing, not a class, outside the stated classes, or of another kind than the first file's."""
    # The first file decides whether labels are class ids or vectors, because they cannot be mixed.
    first = by_file.get(files[0])
    width = len(first) if isinstance(first, list) else 0
    by_stem: dict[str, str] | None = None
    for file in files:
        if file not in by_file:
            by_stem = {_stem(name): name for name in by_file} if by_stem is None else by_stem
            yield _no_label(file, by_stem.get(_stem(file)))
            continue
        problem = _vector_problem(by_file[file], width) if width else _class_problem(by_file[file], stated)
        if problem:
            words = isinstance(by_file[file], str)
            remedy = _numbers_for_words(by_file) if words else f"correct it in {META}"
            yield LabelMismatch(file, f"has label {_shown(by_file[file])}, {problem}", remedy)


def first_label_note(class_ids: np.ndarray) -> str:
    """A note on labels that start above 0, such as those that count from 1; '' for others."""
    first = int(class_ids.min())
    missing = "class 0 has" if first == 1 else f"classes 0 to {first - 1} have"
    return f"labels begin at {first}: {missing} no image" if first else ""


def _absent_note(by_file: dict[str, object], files: list[str]) -> str:
    """A note on labels of images that are not there, for example because only a part was copied; '' if there are none."""
    absent = sorted(by_file.keys() - set(files)) if len(by_file) > len(files) else []
    return f"{counted(absent, 'label')} without an image" if absent else ""


def _pairs(store: Store, entries: object) -> list[tuple[str, object]]:
    """The labels as [(file, class), ...], from such a list or from {file: class}. Raises FileFormatError for anything else."""
    pairs = list(entries.items()) if isinstance(entries, dict) else entries
    if not isinstance(pairs, list) or not all(map(_is_pair, pairs)):
        raise FileFormatError(
            f"labels in {META} of {store.path} are not a list of [file, class]", remedy="write [[file, class], ...], or null"
        )
    return [(name, label) for name, label in pairs]


def _is_pair(entry: object) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)


def _full_name(name: str, folder: str, present: set[str]) -> str:
    """The file that `dataset.json` means by a name, which counts from its own folder or from the top."""
    name = plain_name(name)
    within = name if name.startswith(folder) else folder + name
    return name if within not in present and name in present else within


def _stem(name: str) -> str:
    """The base name of a file, without its suffix and in lower case."""
    return os.path.splitext(name.rpartition("/")[2])[0].casefold()


def _no_label(file: str, labelled: str | None) -> LabelMismatch:
    """The error for a file without a label. labelled: a name that has a label and may mean this file."""
    if labelled is None:
        return LabelMismatch(file, f"has no label in {META}", "label every image, or write null for all")
    problem = f"has no label in {META}, which has one for {labelled}"
    return LabelMismatch(file, problem, f"name the image {file} in {META}")


def _numbers_for_words(by_file: dict[str, object]) -> str:
    words = sorted({label for label in by_file.values() if isinstance(label, str)})
    shown = ", ".join(json.dumps(word, ensure_ascii=False)[:40] for word in words[:3])
    more = ", ..." if len(words) > 3 else ""
    return f'use numbers from 0 as labels, and add the names beside "labels": "class_names": [{shown}{more}]'


def _class_problem(label: object, stated: int) -> str:
    # Exactly int: in Python, True is an int too, and 1.0 equals 1.
    if type(label) is not int or not 0 <= label < MAX_CLASSES:
        return "which is not a class: an integer from 0"
    return f"outside the classes 0..{stated - 1}" if stated and label >= stated else ""


def _vector_problem(label: object, width: int) -> str:
    fits = isinstance(label, list) and len(label) == width and all(type(number) in (int, float) for number in label)
    return "" if fits else f"which is not a vector of {width} numbers like the first"


def _is_one_hot(vector: list[float]) -> bool:
    return vector.count(0) == len(vector) - 1 and vector.count(1) == 1


def _shown(value: object) -> str:
    """A value as JSON, but text without quotes; at most 40 characters."""
    return (value if isinstance(value, str) else json.dumps(value))[:40]
