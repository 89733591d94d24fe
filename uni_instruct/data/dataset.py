"""Dataset: images with their classes, read when asked for."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from uni_instruct.errors import FileFormatError
from uni_instruct.latents import ImageShape

READ_BATCH = 256
MAX_CLASSES = 1_000_000  # more are a mistake, and naming them all would fill the memory


class ImageReader(Protocol):
    """Where a data set's images come from."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Those images, a fresh array uint8 [B, H, W, C]; indices is int64 [B]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images of one shape and, where they have classes, the class of each.

    image_shape is [C, H, W]; labels is int64 [N] in 0..num_classes-1, or None; num_classes is 0 without labels;
    class_names names every class. Raises FileFormatError where these do not fit together.
    """

    name: str
    image_shape: ImageShape
    labels: np.ndarray | None
    num_classes: int
    class_names: tuple[str, ...]
    licence: str
    source: str
    reader: ImageReader = field(repr=False)

    def __post_init__(self) -> None:
        if not len(self):
            raise FileFormatError(f"data set '{self.source}' has no images", remedy="give at least one image")
        if len(self.class_names) != self.num_classes or (self.labels is None) != (self.num_classes == 0):
            raise FileFormatError(
                f"data set '{self.source}' has {self.num_classes} classes, {len(self.class_names)} class names and "
                f"{'no' if self.labels is None else len(self.labels)} labels",
                remedy="name every class, and label every image or none",
            )
        if self.labels is not None:
            self._check_labels(self.labels)

    def __len__(self) -> int:
        return len(self.reader)

    def images(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Those images: uint8 [B, H, W, C]. Reads only them and keeps none.

        Raises FileFormatError for a file that is corrupt or of another size than the rest.
        """
        return self.reader.read(np.asarray(indices, dtype=np.int64))

    def batches(self, batch: int = READ_BATCH) -> Iterator[np.ndarray]:
        """All images in their order, each part uint8 [<=batch, H, W, C]."""
        for start in range(0, len(self), batch):
            yield self.images(np.arange(start, min(start + batch, len(self))))

    def fingerprint(self) -> str:
        """SHA-256 of pixels and labels, in hex: the same data in another container has the same fingerprint."""
        digest = hashlib.sha256(f"{len(self)} {tuple(self.image_shape)} {self.num_classes}".encode())
        for images in self.batches():
            digest.update(images.tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def _check_labels(self, labels: np.ndarray) -> None:
        if len(labels) != len(self):
            raise FileFormatError(
                f"data set '{self.source}' has {len(labels)} labels for {len(self)} images",
                remedy="label every image or none",
            )
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise FileFormatError(
                f"data set '{self.source}' has labels in {labels.min()}..{labels.max()}",
                remedy=f"use 0..{self.num_classes - 1}",
            )


class ArrayReader:
    """Images that are in memory: uint8 [N, H, W, C]."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """See ImageReader."""
        return self.array[indices]


def number_names(count: int) -> tuple[str, ...]:
    """'0', '1', ...: the names of classes that have no other."""
    return tuple(str(number) for number in range(count))
