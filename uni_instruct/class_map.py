"""Classes by name: models and data sets number the same classes differently, so an id means nothing outside its own."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from uni_instruct.data.dataset import Dataset, number_names
from uni_instruct.errors import RequestError

_SHOWN = 12  # names in a message; ImageNet has a thousand


def has_names(names: Sequence[str]) -> bool:
    """Whether classes are told apart by more than their numbers: '0', '1', ... name nothing."""
    return bool(names) and tuple(names) != number_names(len(names))


def ids_by_name(names: Sequence[str], others: Sequence[str]) -> np.ndarray | None:
    """The id among the others of each name, int64 [len(names)]; None where one is missing. Unicode's compositions are alike.

    Of classes that share a name the first is the first, and so on.
    """
    if unmatched_name(names, others) is not None:
        return None
    ids: dict[str, list[int]] = {}
    for number, other in enumerate(others):
        ids.setdefault(_composed(other), []).append(number)
    return np.array([ids[_composed(name)].pop(0) for name in names], dtype=np.int64)


def unmatched_name(names: Sequence[str], others: Sequence[str]) -> str | None:
    """The first name that the others do not have, or have for more or fewer classes; None where each is found."""
    here, there = (Counter(map(_composed, some)) for some in (names, others))
    return next((name for name in names if here[_composed(name)] != there[_composed(name)]), None)


def match_classes(names: Sequence[str], others: Sequence[str], whose: str, others_whose: str) -> np.ndarray | None:
    """The id among the others of each class, int64 [len(names)], found by name; None where either has numbers only.

    Raises RequestError, with both lists, where both have names and they are not the same ones.
    """
    if not has_names(names) or not has_names(others):
        return None
    ids = ids_by_name(names, others)
    if ids is None or len(names) != len(others):
        raise RequestError(
            f"{whose} has the classes {shown_classes(names)}, {others_whose} {shown_classes(others)}",
            remedy="give both the same classes, in any order",
            param="classes",
        )
    return ids


def numbered_as(dataset: Dataset, names: Sequence[str], whose: str) -> Dataset:
    """The data set with its classes in the order of these names; itself where that is its own, or numbers are all there is.

    Raises RequestError, with both lists, where the names are not the same ones.
    """
    ids = match_classes(dataset.class_names, names, f"data set '{dataset.name}'", whose)
    if ids is None or dataset.labels is None or (ids == np.arange(len(ids))).all():
        return dataset
    return replace(dataset, labels=ids[dataset.labels], class_names=tuple(names))


def shown_classes(names: Sequence[str]) -> str:
    """A list of classes for a message."""
    more = f", ... ({len(names):,} in all)" if len(names) > _SHOWN else ""
    return f"({', '.join(names[:_SHOWN])}{more})"


def _composed(name: str) -> str:
    """As NFC: a Mac's file names have accents apart from their letters."""
    return unicodedata.normalize("NFC", name)
