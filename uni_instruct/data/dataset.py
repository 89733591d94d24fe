"""Dataset: images with their classes, read on demand."""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from uni_instruct.data.vae_latents import draw_latents
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.spec import ImageShape
from uni_instruct.system.printable import printable

READ_BATCH = 256
_SAMPLED = 1024
MAX_CLASSES = 1_000_000  # a larger number is a mistake, and a list of its names would fill memory


class ImageReader(Protocol):
    """The source of a data set's images."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The images at `indices` (int64 [B]), a new array: uint8 [B, H, W, C]; for latents float32 [B, 8, H, W]."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Images of one shape and, if they have classes, the class of each.

    image_shape is [C, H, W]. labels is int64 [N] in 0..num_classes-1, or None; num_classes is then 0. class_names names every
    class. latents: a VAE's latents take the place of images; they can be trained on, but not shown. note: what a user should
    know about the data.
    Raises FileFormatError if these do not fit together.
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
        # NFC, as in ModelSpec, because names are compared. `printable`, because a folder's name may contain bytes that are not
        # text.
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
        """The images at `indices`: uint8 [B, H, W, C]. Reads only these and keeps none in memory.

        Raises FileFormatError if a file is corrupt or has another size than the rest, RequestError for latents.
        """
        self.require_images()
        return self.stored(indices)

    def require_images(self) -> None:
        """Raise RequestError if the data are latents, which cannot be shown."""
        if self.latents:
            raise RequestError(
                f"data set '{self.name}' holds latents of a VAE, but images are needed here",
                remedy="give the images that it was made from; to train on latents, --set metric=none",
                param="data",
            )

    def floats(self, indices: Sequence[int] | np.ndarray, seeds: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images at `indices` as network inputs: float32 [B, H, W, C], pixels in [-1, 1].

        Latents are drawn from the VAE's distribution and scaled to a standard deviation of 0.5 (`draw_latents`). Image i
        depends on seeds[i] only.
        """
        stored = self.stored(indices)
        if self.latents:
            return draw_latents(stored, [int(seed) for seed in seeds])
        # x = p / 127.5 - 1 takes 0..255 to [-1, 1], as EDM trains.
        return stored.astype(np.float32) / 127.5 - 1

    def stored(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images at `indices` as stored: uint8 [B, H, W, C]; for latents float32 [B, 8, H, W] of means and deviations."""
        return self.reader.read(np.asarray(indices, dtype=np.int64))

    def batches(self, batch: int = READ_BATCH) -> Iterator[np.ndarray]:
        """All images in order, in batches: uint8 [<=batch, H, W, C]."""
        for part in self._parts(batch):
            yield self.images(part)

    def fingerprint(self) -> str:
        """SHA-256 of pixels (or latents) and labels, in hex. It does not depend on the container (zip, folder, ...)."""
        digest = hashlib.sha256(f"{len(self)} {tuple(self.image_shape)} {self.num_classes}".encode())
        for part in self._parts(READ_BATCH):
            digest.update(self.stored(part).tobytes())
        if self.labels is not None:
            # In one byte order, so that the fingerprint is the same on every machine.
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def sample_fingerprint(self) -> str:
        """SHA-256 of number, shape, labels, class names and up to 1,024 evenly spaced images, in hex.

        It takes a second at most. Like `fingerprint`, it does not depend on the container. It detects added or removed images
        and changed classes. It may miss changed pixels in a few images.
        """
        names = "\n".join(self.class_names)
        digest = hashlib.sha256(f"{len(self)} {tuple(self.image_shape)} {self.num_classes} {names}".encode())
        for part in self._sampled():
            digest.update(part.tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def check_sample(self) -> int:
        """Read up to 1,024 evenly spaced images (all of a small data set), and return how many were read.

        Raises FileFormatError if one is corrupt or has another size than the rest.
        """
        return sum(len(part) for part in self._sampled())

    def _sampled(self) -> Iterator[np.ndarray]:
        count = min(len(self), _SAMPLED)
        sampled = np.arange(count) * len(self) // count
        for start in range(0, count, READ_BATCH):
            yield self.stored(sampled[start : start + READ_BATCH])

    # In parts, because a data set may be larger than memory.
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
    """Reads images from an array in memory: uint8 [N, H, W, C]."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """See ImageReader."""
        return self.array[indices]


def number_names(count: int) -> tuple[str, ...]:
    """'0', '1', ...: the names of classes that have no other names."""
    return tuple(str(number) for number in range(count))
