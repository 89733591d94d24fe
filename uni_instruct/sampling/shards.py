"""Shards: fixed ranges of a request's images. Each is a file that one of several processes claims and writes.

A shard is done if its file is in the work folder. The file is moved there by a rename, so it is always complete. Processes may
make shards in any order. The ranges depend on the request alone.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.sampling.forms import write_npy
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import atomic_file, disk_errors, try_lock

# A killed process loses the shard in progress. So a shard has this many images, or fewer if they are large or take many steps.
SHARD_IMAGES, SHARD_BYTES = 1024, 2**20


@dataclass(frozen=True)
class Shard:
    """The images start..stop - 1 of a request."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """The shard's slice of an array with one entry for each image."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Part:
    """Part `number` (1..count) of a request that is divided into `count` parts, one for each job of a batch system."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Parse text such as '3/16'. Raises RequestError for anything else, and for a part out of range."""
        first, slash, second = text.partition("/")
        if not slash or not (first.isdecimal() and second.isdecimal()) or max(len(first), len(second)) > 9:
            raise RequestError(f"--shard {text[:40]!r} cannot be read", remedy="write it as 3/16", param="shard")
        part = cls(int(first), int(second))
        if not 1 <= part.number <= part.count:
            remedy = f"give 1/{part.count} to {part.count}/{part.count}" if part.count else "give 1/1, or leave it out"
            raise RequestError(f"--shard {text} is out of range", remedy=remedy, param="shard")
        return part

    def of(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        """The part's shards. They are consecutive, and the sizes of any two parts differ by at most one shard."""
        return shards[len(shards) * (self.number - 1) // self.count : len(shards) * self.number // self.count]


WHOLE = Part(1, 1)


def images_per_shard(spec: ModelSpec, batch: int) -> int:
    """The number of images in a shard: a multiple of the batch size.

    So every process makes the same batches. With some engines the last bit of an image depends on its batch.
    """
    affordable = min(SHARD_IMAGES, SHARD_BYTES // (int(np.prod(spec.image_shape)) * spec.steps))
    return max(1, -(-affordable // batch)) * batch


class Shards:
    """The shards of a work folder, which together are images [total, *size] of dtype.

    The images of finished shards can be read through the interface of an ImageReader.
    """

    def __init__(self, folder: Path, size: tuple[int, int, int], dtype: np.dtype, total: int, per_shard: int):
        self.folder, self.size, self.dtype, self.total, self.per_shard = folder, size, dtype, total, per_shard
        self._done: set[Shard] = set()
        self._open: tuple[Shard, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.total

    def all(self) -> list[Shard]:
        """All shards, in order."""
        starts = range(0, self.total, self.per_shard)
        return [Shard(start, min(start + self.per_shard, self.total)) for start in starts]

    def missing(self, part: Part = WHOLE) -> list[Shard]:
        """The shards of that part that are not done yet, in order."""
        return [shard for shard in part.of(self.all()) if not self.is_done(shard)]

    def is_done(self, shard: Shard) -> bool:
        """Whether the shard's file exists and is complete. A machine's crash may have truncated it."""
        if shard not in self._done and self._load(shard) is not None:
            self._done.add(shard)
        return shard in self._done

    @contextmanager
    def claimed(self, shard: Shard) -> Iterator[bool]:
        """Try to claim the shard for the block. Yields True if this process must make it, False if it is done or claimed."""
        # A claim is a kernel lock (flock) on a separate file. It ends with its process, even a killed one, so the shard is
        # free again at once and needs no heartbeat or timeout. If a machine dies, NFS frees its locks when the client's lease
        # expires (some 90 s); its shards wait until then. On file systems without locks, or with locks that other machines do
        # not see (NFS with local_lock, Lustre with localflock), two machines may make the same shard. That costs time but is
        # harmless: a shard's content does not depend on who makes it, and it appears by a rename.
        path = self.folder / f"{shard.start:09d}.claim"
        with self._missing_folder_is_told():
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # is_done is checked after the lock is taken, because the lock's last holder may have just finished the shard.
            held = try_lock(file) is not False
            yield held and not self.is_done(shard)
            if held and self.is_done(shard):
                # Only when the shard is done. Otherwise another process could create a new file of this name and lock it too.
                path.unlink(missing_ok=True)
        finally:
            os.close(file)

    def write(self, shard: Shard, images: np.ndarray) -> None:
        """Write the shard's images. The file is in place when this returns. Raises DiskError."""
        assert images.shape == (len(shard), *self.size)
        assert images.dtype == self.dtype
        with atomic_file(self._path(shard)) as partial, partial.open("wb") as file:
            write_npy(file, self.dtype, images.shape, [images])
        self._done.add(shard)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """The images at these indices, as a new array. Only their shards are read. Raises FileFormatError if one is missing."""
        indices = np.asarray(indices)
        out = np.empty((len(indices), *self.size), dtype=self.dtype)
        starts = indices - indices % self.per_shard
        for start in np.unique(starts):
            rows = starts == start
            out[rows] = self._shard(Shard(int(start), min(int(start) + self.per_shard, self.total)))[indices[rows] - start]
        return out

    def _shard(self, shard: Shard) -> np.ndarray:
        if self._open is None or self._open[0] != shard:
            images = self._load(shard)
            if images is None:
                raise _lost(self._path(shard))
            self._open = shard, images
        return self._open[1]

    def _load(self, shard: Shard) -> np.ndarray | None:
        try:
            images: np.ndarray = np.load(self._path(shard), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return images if images.dtype == self.dtype and images.shape == (len(shard), *self.size) else None

    @contextmanager
    def _missing_folder_is_told(self) -> Iterator[None]:
        try:
            with disk_errors(self.folder):
                yield
        except FileNotFoundError as error:
            raise _lost(self.folder) from error

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.start:09d}.npy"


def _lost(path: Path) -> FileFormatError:
    return FileFormatError(f"{path} was removed while it was in use", remedy="run the same command again")
