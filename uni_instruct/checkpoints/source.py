"""Read a range of an open file from front to back, never beyond its end."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from uni_instruct.checkpoints.budget import MalformedFile
from uni_instruct.errors import RequestError
from uni_instruct.system.file_type import import_of_weights

_BLOCK = 1 << 20


class Source:
    """Reads a file between two positions. `position` is that of the next byte."""

    def __init__(self, file: BinaryIO, start: int, end: int):
        self._file = file
        self.position, self.end = start, end
        file.seek(start)

    def read(self, size: int) -> bytes:
        """The next bytes. Raises MalformedFile if there are fewer."""
        self._advance(size)
        data = self._file.read(size)
        if len(data) != size:
            raise MalformedFile("ends too early")
        return data

    def starts_with(self, magic: bytes) -> bool:
        """Whether the next bytes are these. The position does not change."""
        found = self._file.read(min(len(magic), self.end - self.position))
        self._file.seek(self.position)
        return found == magic

    def unsigned(self, size: int) -> int:
        """The next bytes as a little-endian number."""
        return int.from_bytes(self.read(size), "little")

    def line(self, limit: int) -> bytes:
        """The next bytes up to a newline, without it. Raises MalformedFile if there is none within the limit."""
        # With a limit, because a file of one endless line would otherwise be read into memory.
        line = self._file.readline(min(limit, self.end - self.position))
        self._advance(len(line))
        if not line.endswith(b"\n"):
            raise MalformedFile("ends too early or has a name that is too long")
        return line[:-1]

    def span(self, size: int) -> "Span":
        """The next bytes as a Span. They are skipped, not read."""
        start = self.position
        self._advance(size)
        self._file.seek(self.position)
        return Span(self._file, start, size)

    def _advance(self, size: int) -> None:
        if size > self.end - self.position:
            raise MalformedFile(f"ends too early: {size:,} bytes are announced, but only {self.end - self.position:,} are left")
        self.position += size


@dataclass(frozen=True, eq=False)
class Span:
    """A part of an open file, read when it is needed."""

    file: BinaryIO
    start: int
    size: int

    @contextmanager
    def opened(self) -> Iterator[Source]:
        """Read the span. Afterwards the file is at its former position again, for its other readers."""
        position = self.file.tell()
        try:
            yield Source(self.file, self.start, self.start + self.size)
        finally:
            self.file.seek(position)

    def content(self, most: int) -> bytes:
        """Its first bytes, at most `most`."""
        with self.opened() as source:
            return source.read(min(self.size, most))

    def crc(self) -> int:
        """The CRC-32 of its bytes."""
        crc = 0
        with self.opened() as source:
            while left := source.end - source.position:
                crc = zlib.crc32(source.read(min(left, _BLOCK)), crc)
        return crc

    def read_into(self, array: np.ndarray) -> None:
        """Fill a contiguous array of the span's size."""
        self.file.seek(self.start)
        # Python cannot cast a view of no bytes.
        if array.nbytes and self.file.readinto(array.data.cast("B")) != self.size:  # type: ignore[attr-defined]
            raise MalformedFile("ends too early")


@contextmanager
def opened(source: str | Path | BinaryIO) -> Iterator[tuple[BinaryIO, str, int]]:
    """The file, its name for messages, and its size. An open file stays open. Raises RequestError if there is no such file."""
    if not isinstance(source, str | Path):
        yield source, str(getattr(source, "name", "the file")), source.seek(0, 2)
        return
    path = Path(source)
    if not path.is_file():
        problem = f"{path} is not a file" if path.exists() else f"there is no file {path}"
        command = import_of_weights(path) if path.is_dir() else ""
        remedy = f"give the path of its weights: {command}" if command else "give the path of a checkpoint"
        raise RequestError(problem, remedy=remedy, param="checkpoint")
    with path.open("rb") as file:
        yield file, str(path), file.seek(0, 2)
