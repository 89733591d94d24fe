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
    """The id among the others of each name, int64 [len(names)]. Unicode's compositions are alike.

    None where one is missing, or is the name of several, unless both are the same list.
    """
    mine, theirs = [_composed(name) for name in names], [_composed(other) for other in others]
    if mine == theirs:
        return np.arange(len(mine), dtype=np.int64)
    # ImageNet has two classes 'crane': found by name, all images of both would become the second's.
    repeated = {name for name, count in Counter(theirs).items() if count > 1}
    known = {other: -1 if other in repeated else number for number, other in enumerate(theirs)}
    ids = [known.get(name, -1) for name in mine]
    return None if -1 in ids else np.array(ids, dtype=np.int64)


def repeated_name(names: Sequence[str]) -> str:
    """'2 ... are called NAME': the number of classes that share the first such name, and that name; empty where none do."""
    name, count = Counter(map(_composed, names)).most_common(1)[0] if names else ("", 0)
    return f"{count} are called {name}" if count > 1 else ""


def match_classes(names: Sequence[str], others: Sequence[str], whose: str, others_whose: str) -> np.ndarray | None:
    """The id among the others of each class, int64 [len(names)], found by name; None where either has numbers only.

    Raises RequestError, with both lists, where both have names and they are not the same ones.
    """
    if not has_names(names) or not has_names(others):
        return None
    ids = ids_by_name(names, others)
    if ids is None or len(names) != len(others):
        twice = repeated_name(others) or repeated_name(names)
        raise RequestError(
            f"{whose} has the classes {shown_classes(names)}, {others_whose} {shown_classes(others)}",
            remedy=f"give both the same classes{f' in one order: {twice}' if twice else ', in any order'}",
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
