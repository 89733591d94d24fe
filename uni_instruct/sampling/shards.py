"""Shards: fixed ranges of a request's images, each a file that any of several processes claims, makes, and is done with.

Done is what stands in the work folder under a shard's name. It appears there whole, by a rename, so that no shard is ever
half done, and shards may be done in any order, by anybody. Their ranges follow from the request alone.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.files import atomic_file, disk_errors, try_lock
from uni_instruct.sampling.forms import write_npy
from uni_instruct.spec import ModelSpec

# A shard is what a killed process loses: this many images, or fewer where they are large or take many steps.
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
        """Its part of whatever has one entry an image."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Part:
    """Part `number` of `count` of a request, 1..count: what one job of a batch system makes."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """'3/16'. Raises RequestError for anything else, and for a part out of range."""
        first, slash, second = text.partition("/")
        if not slash or not (first.isdecimal() and second.isdecimal()) or max(len(first), len(second)) > 9:
            raise RequestError(f"--shard {text[:40]!r} cannot be read", remedy="write it as 3/16", param="shard")
        part = cls(int(first), int(second))
        if not 1 <= part.number <= part.count:
            remedy = f"give 1/{part.count} to {part.count}/{part.count}" if part.count else "give 1/1, or leave it out"
            raise RequestError(f"--shard {text} is out of range", remedy=remedy, param="shard")
        return part

    def of(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        """Its shards: consecutive ones, as many as any other part's give or take one."""
        return shards[len(shards) * (self.number - 1) // self.count : len(shards) * self.number // self.count]


WHOLE = Part(1, 1)


def images_per_shard(spec: ModelSpec, batch: int) -> int:
    """A whole number of batches, so that every batch is the same whoever makes it: some engines' last bit depends on that."""
    affordable = min(SHARD_IMAGES, SHARD_BYTES // (int(np.prod(spec.image_shape)) * spec.steps))
    return max(1, -(-affordable // batch)) * batch


class Shards:
    """The shards of a work folder, as images [total, *size] of dtype; what is done can be read as an ImageReader's."""

    def __init__(self, folder: Path, size: tuple[int, int, int], dtype: np.dtype, total: int, per_shard: int):
        self.folder, self.size, self.dtype, self.total, self.per_shard = folder, size, dtype, total, per_shard
        self._done: set[Shard] = set()
        self._open: tuple[Shard, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.total

    def all(self) -> list[Shard]:
        """Every shard, in order."""
        starts = range(0, self.total, self.per_shard)
        return [Shard(start, min(start + self.per_shard, self.total)) for start in starts]

    def missing(self, part: Part = WHOLE) -> list[Shard]:
        """The shards of that part that nobody is done with yet, in their order."""
        return [shard for shard in part.of(self.all()) if not self.is_done(shard)]

    def is_done(self, shard: Shard) -> bool:
        """Whether its file is there and whole: the crash of a machine may cut a file short."""
        if shard not in self._done and self._load(shard) is not None:
            self._done.add(shard)
        return shard in self._done

    @contextmanager
    def claimed(self, shard: Shard) -> Iterator[bool]:
        """Whether the shard is this process's to make, until the block ends; not where it is done or another is at it."""
        # A claim is a kernel lock on a file of its own. It ends with its process, however that ends, so a dead one's shard is
        # free at once, with no heartbeat to keep and no age to guess. Of a machine that dies, NFS frees the locks when the
        # client's lease runs out (some 90 s); until then its shards wait. A file system without locks, or with locks that
        # other machines do not see (NFS with local_lock, Lustre with localflock), has no claims between them: machines then
        # make the same shards. That costs time, never images: a shard is the same whoever makes it, and appears by a rename.
        path = self.folder / f"{shard.start:09d}.claim"
        with self._missing_folder_is_told():
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Looked at after the lock is held: whoever held it before may have finished just now.
            held = try_lock(file) is not False
            yield held and not self.is_done(shard)
            if held and self.is_done(shard):
                # Not before: of two processes with locks on two files of this name, both would take the shard for theirs.
                path.unlink(missing_ok=True)
        finally:
            os.close(file)

    def write(self, shard: Shard, images: np.ndarray) -> None:
        """The shard's images, on disk when this returns."""
        assert images.shape == (len(shard), *self.size)
        assert images.dtype == self.dtype
        with atomic_file(self._path(shard)) as partial, partial.open("wb") as file:
            write_npy(file, self.dtype, images.shape, [images])
        self._done.add(shard)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Those images, a fresh array; no more than the shards they lie in are read. Raises FileFormatError for a lost one."""
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
    return FileFormatError(f"{path} was removed while it was needed", remedy="run the same command again")
