"""Dataset: images with their classes, read when asked for."""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from uni_instruct.data.vae_latents import draw_latents
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.printable import printable
from uni_instruct.spec import ImageShape

READ_BATCH = 256
_SAMPLED = 1024
MAX_CLASSES = 1_000_000  # more are a mistake, and naming them all would fill the memory


class ImageReader(Protocol):
    """Where a data set's images come from."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Those images, a fresh array uint8 [B, H, W, C]; of latents, float32 [B, 8, H, W]. indices is int64 [B]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images of one shape and, where they have classes, the class of each.

    image_shape is [C, H, W]; labels is int64 [N] in 0..num_classes-1, or None; num_classes is 0 without labels;
    class_names names every class. latents: a VAE's latents stand in for images; they can be trained on, not looked at.
    note is what a user should know about it. Raises FileFormatError where these do not fit together.
    """

    name: str
    image_shape: ImageShape
    labels: np.ndarray | None
    num_classes: int
    class_names: tuple[str, ...]
    licence: str
    source: str
    reader: ImageReader = field(repr=False)
    latents: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        # As in ModelSpec: names are compared in one form of Unicode. A folder's name need not be text.
        names = (printable(unicodedata.normalize("NFC", name)) for name in self.class_names)
        object.__setattr__(self, "class_names", tuple(names))
        object.__setattr__(self, "name", printable(self.name))
        if not len(self):
            raise FileFormatError(f"data set '{self.source}' has no images", remedy="give at least one image")
        if min(self.image_shape) < 1:
            _, height, width = self.image_shape
            raise FileFormatError(
                f"data set '{self.source}' has images of {width}x{height}", remedy="give images of at least one pixel"
            )
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

        Raises FileFormatError for a file that is corrupt or of another size than the rest, RequestError for latents.
        """
        self.require_images()
        return self.stored(indices)

    def require_images(self) -> None:
        """Raises RequestError where it holds latents, which cannot be looked at."""
        if self.latents:
            raise RequestError(
                f"data set '{self.name}' holds latents of a VAE, and images are needed here",
                remedy="give the images that it was made from; to train on latents, --set metric=none",
                param="data",
            )

    def floats(self, indices: Sequence[int] | np.ndarray, seeds: Sequence[int] | np.ndarray) -> np.ndarray:
        """Those images as networks take them: float32 [B, H, W, C], pixels in [-1, 1].

        Latents are drawn from the VAE's distribution and have a deviation of 0.5 (`draw_latents`); image i depends on seeds[i]
        alone.
        """
        stored = self.stored(indices)
        if self.latents:
            return draw_latents(stored, [int(seed) for seed in seeds])
        # x = p / 127.5 - 1 takes 0..255 to [-1, 1], as EDM trains.
        return stored.astype(np.float32) / 127.5 - 1

    def stored(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Those images as they are stored: uint8 [B, H, W, C]; of latents, means and deviations, float32 [B, 8, H, W]."""
        return self.reader.read(np.asarray(indices, dtype=np.int64))

    def batches(self, batch: int = READ_BATCH) -> Iterator[np.ndarray]:
        """All images in their order, each part uint8 [<=batch, H, W, C]."""
        for part in self._parts(batch):
            yield self.images(part)

    def fingerprint(self) -> str:
        """SHA-256 of pixels (or latents) and labels, in hex: the same data in another container has the same fingerprint."""
        digest = hashlib.sha256(f"{len(self)} {tuple(self.image_shape)} {self.num_classes}".encode())
        for part in self._parts(READ_BATCH):
            digest.update(self.stored(part).tobytes())
        if self.labels is not None:
            # In one byte order, or the fingerprint would depend on the machine.
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def sample_fingerprint(self) -> str:
        """SHA-256 of number, shape, labels, class names and up to 1,024 images, evenly spaced: a second's work at most.

        As `fingerprint`, it does not depend on the container. It tells data apart to which images were added, of which some
        were removed, or whose classes are others; a few pictures that were painted over it may miss.
        """
        names = "\n".join(self.class_names)
        digest = hashlib.sha256(f"{len(self)} {tuple(self.image_shape)} {self.num_classes} {names}".encode())
        for part in self._sampled():
            digest.update(part.tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def check_sample(self) -> int:
        """Reads up to 1,024 images, evenly spaced: all of a small data set; returns how many.

        Raises FileFormatError for one that is corrupt or of another size than the rest.
        """
        return sum(len(part) for part in self._sampled())

    def _sampled(self) -> Iterator[np.ndarray]:
        count = min(len(self), _SAMPLED)
        sampled = np.arange(count) * len(self) // count
        for start in range(0, count, READ_BATCH):
            yield self.stored(sampled[start : start + READ_BATCH])

    # Part by part: a data set may be larger than the memory.
    def _parts(self, batch: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self), batch):
            yield np.arange(start, min(start + batch, len(self)))

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
