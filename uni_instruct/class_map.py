"""Match classes by name. Models and data sets may number the same classes differently, so an id is valid only in its own."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from uni_instruct.data.dataset import Dataset, number_names
from uni_instruct.errors import RequestError

_SHOWN = 12  # names in a message; ImageNet has a thousand


def has_names(names: Sequence[str]) -> bool:
    """Whether the classes have real names. The digits '0', '1', ... that stand in for missing names do not count."""
    return bool(names) and tuple(names) != number_names(len(names))


def ids_by_name(names: Sequence[str], others: Sequence[str]) -> np.ndarray | None:
    """The index in `others` of each name: int64 [len(names)]; None if one is missing. Names are compared in Unicode's NFC.

    Classes that share a name are matched in their order.
    """
    if unmatched_name(names, others) is not None:
        return None
    ids: dict[str, list[int]] = {}
    for number, other in enumerate(others):
        ids.setdefault(_nfc(other), []).append(number)
    return np.array([ids[_nfc(name)].pop(0) for name in names], dtype=np.int64)


def unmatched_name(names: Sequence[str], others: Sequence[str]) -> str | None:
    """The first name that `others` lack, or have for more or fewer classes; None if all are found."""
    here, there = (Counter(map(_nfc, some)) for some in (names, others))
    return next((name for name in names if here[_nfc(name)] != there[_nfc(name)]), None)


def match_classes(names: Sequence[str], others: Sequence[str], whose: str, others_whose: str) -> np.ndarray | None:
    """The index in `others` of each class, by name: int64 [len(names)]; None if either side has numbers only.

    whose, others_whose: the owners of the two lists, for the error. Raises RequestError, which shows both lists, if the names
    are not the same set.
    """
    if not has_names(names) or not has_names(others):
        return None
    ids = ids_by_name(names, others)
    if ids is None or len(names) != len(others):
        raise RequestError(
            f"{whose} has the classes {format_class_names(names)}, {others_whose} {format_class_names(others)}",
            remedy="give both the same classes, in any order",
            param="classes",
        )
    return ids


def renumber_labels(dataset: Dataset, names: Sequence[str], whose: str) -> Dataset:
    """The data set with its labels renumbered to the order of `names`.

    The data set itself is returned if its order is the same already, or if either side has numbers only. Raises RequestError,
    which shows both lists, if the names are not the same set.
    """
    ids = match_classes(dataset.class_names, names, f"data set '{dataset.name}'", whose)
    if ids is None or dataset.labels is None or (ids == np.arange(len(ids))).all():
        return dataset
    return replace(dataset, labels=ids[dataset.labels], class_names=tuple(names))


def format_class_names(names: Sequence[str]) -> str:
    """The class names for a message, shortened if there are many."""
    more = f", ... ({len(names):,} in all)" if len(names) > _SHOWN else ""
    return f"({', '.join(names[:_SHOWN])}{more})"


def _nfc(name: str) -> str:
    """The name in Unicode's NFC. macOS stores accents in file names as separate characters (NFD)."""
    return unicodedata.normalize("NFC", name)
