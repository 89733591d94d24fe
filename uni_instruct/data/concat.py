"""Join several data sets into one, in the order in which they are given."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from uni_instruct.data.dataset import Dataset, ImageReader, number_names
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.spec import ImageShape


def concatenated(parts: Sequence[Dataset]) -> Dataset:
    """The images of all parts, in order. Parts whose class names are plain numbers take the names of another part.

    Raises FileFormatError if shapes, classes or content (images or latents) differ.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        _check_fit(first, part)
    return Dataset(
        name="+".join(dict.fromkeys(part.name for part in parts)),
        image_shape=first.image_shape,
        labels=None if first.labels is None else np.concatenate([part.labels for part in parts if part.labels is not None]),
        num_classes=first.num_classes,
        class_names=next((part.class_names for part in parts if _has_names(part)), first.class_names),
        licence=", ".join(dict.fromkeys(part.licence for part in parts)),
        source=",".join(part.source for part in parts),
        reader=ConcatReader([part.reader for part in parts]),
        latents=first.latents,
        note="; ".join(dict.fromkeys(part.note for part in parts if part.note)),
    )


class ConcatReader:
    """Reads from several readers as if they were one; the indices of each reader follow those of the one before."""

    def __init__(self, readers: Sequence[ImageReader]):
        self.readers = readers
        self.ends = np.cumsum([len(reader) for reader in readers])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """See ImageReader."""
        # Negative indices count from the end, as in NumPy.
        indices = np.where(indices < 0, indices + len(self), indices)
        owners = np.searchsorted(self.ends, indices, side="right")
        if not len(indices):
            return self.readers[0].read(indices)
        # One call to each reader, for all of its images. Reading one by one would cost a call per image.
        out: np.ndarray | None = None
        for owner in np.unique(owners):
            chosen, reader = owners == owner, self.readers[owner]
            images = reader.read(indices[chosen] - self.ends[owner] + len(reader))
            out = np.empty((len(indices), *images.shape[1:]), images.dtype) if out is None else out
            out[chosen] = images
        assert out is not None
        return out


def with_classes(dataset: Dataset, num_classes: int) -> Dataset:
    """The data set with `num_classes` classes, for a data set that has no images of the last classes.

    Raises RequestError if it has no classes, FileFormatError if a label is outside the number.
    """
    if dataset.labels is None:
        raise RequestError(
            f"data set '{dataset.name}' has no classes{f' ({dataset.note})' if dataset.note else ''}",
            remedy="leave the number of classes out",
            param="num_classes",
        )
    names = dataset.class_names if len(dataset.class_names) == num_classes else number_names(num_classes)
    return replace(dataset, num_classes=num_classes, class_names=names)


def shape_remedy(one: ImageShape, other: ImageShape) -> str:
    """The command that brings images of two shapes [C, H, W] to one, with only the options that are needed."""
    options = " --resolution" * (tuple(one[1:]) != tuple(other[1:])) + " --channels" * (one[0] != other[0])
    return f"bring them to one shape with 'uni-instruct data prepare{options}'"


def _check_fit(first: Dataset, part: Dataset) -> None:
    remedy = "give data sets with the same classes"
    if first.latents != part.latents or first.image_shape != part.image_shape:
        remedy = shape_remedy(first.image_shape, part.image_shape)
    elif first.num_classes != part.num_classes:
        remedy = "if some lack images of the last classes, state the number with 'uni-instruct data prepare --num-classes'"
    if _content(first) != _content(part):
        raise FileFormatError(f"{first.source} has {_content(first)}, {part.source} {_content(part)}", remedy=remedy)
    if _has_names(first) and _has_names(part) and first.class_names != part.class_names:
        mine, theirs = next(pair for pair in zip(first.class_names, part.class_names, strict=True) if pair[0] != pair[1])
        raise FileFormatError(f"a class is '{mine}' in {first.source} and '{theirs}' in {part.source}", remedy=remedy)


def _content(dataset: Dataset) -> str:
    what = "latents" if dataset.latents else "images"
    return f"{what} of {list(dataset.image_shape)} and {dataset.num_classes or 'no'} classes"


def _has_names(dataset: Dataset) -> bool:
    return dataset.class_names != number_names(dataset.num_classes)
