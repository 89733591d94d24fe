"""Which classes images are made of: evenly drawn, or as often as in the data that a generator is to imitate."""

from typing import NamedTuple

import numpy as np

from uni_instruct.data import Dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate.sample_source import reference_class_ids
from uni_instruct.evaluate.statistics import Statistics
from uni_instruct.generate import resolve_class_ids
from uni_instruct.spec import ModelSpec

UNIFORM, DATA = "uniform", "data"
# Where the largest class has more than so many times the images of the smallest, a set that is drawn evenly is another
# distribution than the data's, and a distance to them is one of class shares. Below, what that adds is small, and results stay
# comparable with earlier ones.
UNBALANCED = 1.5


class DrawnClasses(NamedTuple):
    """A class id for each seed, int64 [N], None without classes; how they were drawn ('' without); what to say of it."""

    class_ids: np.ndarray | None
    how: str
    note: str = ""


def class_counts(spec: ModelSpec, reference: Dataset | Statistics | None) -> np.ndarray | None:
    """How many images of the reference each of the model's classes has, by name: int64 [K].

    None where either has no classes, or the model has one that the reference lacks.
    """
    if not spec.num_classes or not isinstance(reference, Dataset) or reference.labels is None:
        return None
    names = tuple(spec.class_name(number) for number in range(spec.num_classes))
    ids, _ = reference_class_ids(np.arange(spec.num_classes), names, reference)
    if ids is None:
        return None
    counts: np.ndarray = np.bincount(reference.labels, minlength=reference.num_classes)[ids]
    return counts if counts.sum() else None


def draw_classes(
    spec: ModelSpec, seeds: range | list[int], reference: Dataset | Statistics | None, how: str | None = None
) -> DrawnClasses:
    """The seeds' classes: 'uniform', or as in the reference ('data'); None chooses the latter where it is unbalanced.

    Raises RequestError where the reference does not say how often each class occurs, or there are no classes.
    """
    if not spec.num_classes:
        if how is not None:
            raise RequestError(f"generator '{spec.name}' has no classes", remedy="leave --classes out", param="classes")
        return DrawnClasses(None, "")
    counts = class_counts(spec, reference)
    if counts is None and how == DATA:
        raise RequestError(
            "the reference does not say how often each of the generator's classes occurs",
            remedy="give a data set that has them as --reference, or --classes uniform",
            param="classes",
        )
    unbalanced = counts is not None and counts.max() > UNBALANCED * counts.min()
    if counts is None or how == UNIFORM or (how is None and not unbalanced):
        return DrawnClasses(resolve_class_ids(spec, seeds), UNIFORM)
    note = f"classes are drawn as often as in the reference ({counts.min():,} to {counts.max():,} images each)"
    return DrawnClasses(resolve_class_ids(spec, seeds, shares=counts), DATA, note if unbalanced else "")
