"""What a `dataset.json` says about the files beside it: labels, number and names of classes, name, licence."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from uni_instruct.data.dataset import MAX_CLASSES, number_names
from uni_instruct.data.storage import UNREADABLE, Store, name_in_store, reason_of
from uni_instruct.errors import FileFormatError

META = "dataset.json"


class Misfit(NamedTuple):
    """A file whose label is wrong, the problem in words that follow the file's name, and the remedy."""

    file: str
    problem: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Labels:
    """class_ids: int64 [N], or None. note: why there are no classes although there are labels."""

    class_ids: np.ndarray | None
    num_classes: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Description:
    """The fields of a Dataset that `dataset.json` gives; see there."""

    name: str
    labels: np.ndarray | None
    num_classes: int
    class_names: tuple[str, ...]
    licence: str
    source: str
    note: str


def read_description(store: Store, files: list[str], meta: dict[str, object]) -> Description:
    """What `dataset.json` says about the files. Raises FileFormatError where it does not fit them."""
    labels = read_labels(store, files, meta)
    named = meta.get("class_names")
    class_names = tuple(str(name) for name in named) if isinstance(named, list) else ()
    return Description(
        name=str(meta.get("name") or store.path.stem),
        labels=labels.class_ids,
        num_classes=labels.num_classes,
        # Names that do not fit the number of classes are passed over: EDM's tools write none, others write all sorts.
        class_names=class_names if len(class_names) == labels.num_classes else number_names(labels.num_classes),
        licence=str(meta.get("licence") or "unknown"),
        source=str(store.path),
        note=labels.note,
    )


def read_meta(store: Store, names: list[str]) -> dict[str, object]:
    """The content of `dataset.json`; {} where it is not among the names. Raises FileFormatError where it is no JSON object."""
    if META not in names:
        return {}
    try:
        meta = json.loads(store.read(META))
    except UNREADABLE as error:
        raise FileFormatError(f"{META} in {store.path} is not JSON: {reason_of(error)}", remedy="prepare it again") from error
    if not isinstance(meta, dict):
        raise FileFormatError(f"{META} in {store.path} is not an object", remedy='write {"labels": [[file, class], ...]}')
    return meta


def read_labels(store: Store, files: list[str], meta: dict[str, object]) -> Labels:
    """The files' classes. One-hot vectors are classes; other vectors give none.

    Raises FileFormatError for the first file whose label is missing or wrong.
    """
    stated = stated_classes(store, meta)
    by_file = label_entries(store, meta)
    if by_file is None:
        return Labels(class_ids=None, num_classes=0)
    misfit = next(misfits(by_file, files, stated), None)
    if misfit is not None:
        raise FileFormatError(f"{name_in_store(store, misfit.file)} {misfit.problem}", remedy=misfit.remedy)
    # All are integers or all are vectors now: whatever differs from the first is a misfit.
    labels = [by_file[file] for file in files]
    vectors = [label for label in labels if isinstance(label, list)]
    if not vectors:
        class_ids = np.array(labels, dtype=np.int64)
        return Labels(class_ids=class_ids, num_classes=stated or int(class_ids.max()) + 1)
    if not all(map(_is_one_hot, vectors)):
        note = f"labels are vectors of {len(vectors[0])} numbers and not one-hot: read without classes"
        return Labels(class_ids=None, num_classes=0, note=note)
    class_ids = np.array([vector.index(1) for vector in vectors], dtype=np.int64)
    return Labels(class_ids=class_ids, num_classes=stated or len(vectors[0]))


def label_entries(store: Store, meta: dict[str, object]) -> dict[str, object] | None:
    """File -> label, as `dataset.json` has them; None where it has none. Raises FileFormatError where they are no list."""
    entries = meta.get("labels")
    if entries is None:
        return None
    try:
        return dict(cast(Iterable[tuple[str, object]], entries))
    except (TypeError, ValueError) as error:
        raise FileFormatError(
            f"labels in {META} of {store.path} are not a list of [file, class]", remedy="write them so, or null"
        ) from error


def stated_classes(store: Store, meta: dict[str, object]) -> int:
    """The number of classes that `dataset.json` states, 0 where it states none. Raises FileFormatError for a wrong one."""
    stated = meta.get("num_classes") or 0
    if type(stated) is not int or not 0 <= stated <= MAX_CLASSES:
        raise FileFormatError(
            f"num_classes {_shown(stated)} in {META} of {store.path} is not a number of classes",
            remedy="leave it out, or write the number",
        )
    return stated


def misfits(by_file: dict[str, object], files: list[str], stated: int) -> Iterator[Misfit]:
    """Files whose label is missing, no class, outside the stated classes, or of another kind than the first file's."""
    # The first file decides whether labels are class ids or vectors: a mixture has no meaning.
    first = by_file.get(files[0])
    width = len(first) if isinstance(first, list) else 0
    for file in files:
        if file not in by_file:
            yield Misfit(file, f"has no label in {META}", "label every image, or write null for all")
            continue
        problem = _vector_problem(by_file[file], width) if width else _class_problem(by_file[file], stated)
        if problem:
            yield Misfit(file, f"has label {_shown(by_file[file])}, {problem}", f"correct it in {META}")


def _class_problem(label: object, stated: int) -> str:
    # Exactly int: True is an int to Python, and 1.0 equals one.
    if type(label) is not int or not 0 <= label < MAX_CLASSES:
        return "which is not a class: an integer from 0"
    return f"outside the classes 0..{stated - 1}" if stated and label >= stated else ""


def _vector_problem(label: object, width: int) -> str:
    fits = isinstance(label, list) and len(label) == width and all(type(number) in (int, float) for number in label)
    return "" if fits else f"which is not a vector of {width} numbers as the first is"


def _is_one_hot(vector: list[float]) -> bool:
    return vector.count(0) == len(vector) - 1 and vector.count(1) == 1


def _shown(value: object) -> str:
    text = str(value)[:40]
    return text if text.isprintable() else ascii(text)
