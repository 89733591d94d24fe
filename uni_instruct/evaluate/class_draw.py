"""Draw the classes of the images to score: uniformly, or with the frequencies of the reference data."""

from typing import NamedTuple

import numpy as np

from uni_instruct.data import Dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate.sample_source import reference_class_ids
from uni_instruct.evaluate.statistics import Statistics
from uni_instruct.generate import resolve_class_ids
from uni_instruct.spec import ModelSpec

UNIFORM, DATA = "uniform", "data"
# If the largest class has more than this many times the images of the smallest, classes are drawn with the data's frequencies.
# Uniform classes would then be another distribution than the data's, and the distance would measure class frequencies. Below
# this ratio the effect is small, and a uniform draw keeps results comparable with earlier ones.
MAX_BALANCED_RATIO = 1.5


class DrawnClasses(NamedTuple):
    """Class ids int64 [N], None without classes; how they were drawn ('uniform', 'data', '' without classes); a note or ''."""

    class_ids: np.ndarray | None
    how: str
    note: str = ""


def class_counts(spec: ModelSpec, reference: Dataset | Statistics | None) -> np.ndarray | None:
    """The number of the reference's images in each of the model's classes, matched by name: int64 [K].

    None if the model or the reference has no classes, or the model has a class that the reference lacks.
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
    """Draw a class for each seed.

    how: 'uniform', or 'data' for the frequencies of the reference. None chooses 'data' if the reference is unbalanced, else
    'uniform'.

    Raises RequestError for 'data' if the reference has no class frequencies, and for any `how` if the model has no classes.
    """
    if not spec.num_classes:
        if how is not None:
            raise RequestError(f"generator '{spec.name}' has no classes", remedy="leave --classes out", param="classes")
        return DrawnClasses(None, "")
    counts = class_counts(spec, reference)
    if counts is None and how == DATA:
        raise RequestError(
            "the reference has no frequencies for the generator's classes",
            remedy="give a data set with these classes as --reference, or --classes uniform",
            param="classes",
        )
    unbalanced = counts is not None and counts.max() > MAX_BALANCED_RATIO * counts.min()
    if counts is None or how == UNIFORM or (how is None and not unbalanced):
        return DrawnClasses(resolve_class_ids(spec, seeds), UNIFORM)
    note = f"classes are drawn with the frequencies of the reference ({counts.min():,} to {counts.max():,} images each)"
    return DrawnClasses(resolve_class_ids(spec, seeds, shares=counts), DATA, note if unbalanced else "")
