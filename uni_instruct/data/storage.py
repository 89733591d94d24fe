"""Where a data set's files are: a folder or a zip, whose files are read one by one and do not stay in memory."""

import os
import re
import struct
import threading
import tokenize
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from uni_instruct.errors import FileFormatError
from uni_instruct.zip_entry import entry_start

# What zipfile, zlib, Pillow, NumPy and json raise over a damaged file: their parsers fail in any way that Python code can.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    MemoryError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    zlib.error,
    struct.error,
    zipfile.BadZipFile,
    tokenize.TokenError,
)
_MEMBER = np.dtype([("offset", "i8"), ("packed", "i8"), ("size", "i8"), ("crc", "u4"), ("method", "u1"), ("locked", "?")])
_DIGITS = str.maketrans("123456789", "000000000")


class Store(Protocol):
    """Files by name: a folder or a zip."""

    path: Path

    def names(self) -> list[str]:
        """Every file, in any order; with forward slashes, relative to the store."""
        ...

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        ...


class FolderStore:
    """The files below a folder; hidden folders are passed over."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        """Every file."""
        found: list[str] = []
        for folder, subfolders, files in os.walk(self.path, followlinks=True):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            relative = Path(folder).relative_to(self.path)
            found.extend((relative / name).as_posix() for name in files)
        return found

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        return (self.path / name).read_bytes()


class ZipStore:
    """The members of a zip. Of its directory only names and places stay in memory: some 110 bytes a member.

    `zipfile` keeps five times as much, in every process that reads; a data set may have a million members.
    """

    def __init__(self, path: Path):
        self.path = path
        self._opened = threading.local()
        try:
            with zipfile.ZipFile(path) as archive:
                entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
        except UNREADABLE as error:
            reason = reason_of(error).lower()
            raise FileFormatError(f"{path} is not a whole zip: {reason}", remedy="copy or prepare it again") from error
        self._names = [entry.filename for entry in entries]
        self._members = np.fromiter(map(_member, entries), _MEMBER, count=len(entries))

    def names(self) -> list[str]:
        """Every member."""
        return [name for name in self._names if not name.endswith("/")]

    def read(self, name: str) -> bytes:
        """The member's bytes, its checksum verified. Raises BadZipFile where they are not whole."""
        place = bisect_right(self._names, name) - 1
        if place < 0 or self._names[place] != name:
            raise KeyError(name)
        member = self._members[place]
        file = self._own_file()
        start, _ = entry_start(file, int(member["offset"]))
        file.seek(start)
        return _unpacked(file.read(member["packed"]), member)

    def _own_file(self) -> BinaryIO:
        """The zip, opened by every thread of every process for itself, as an open file has one position."""
        if getattr(self._opened, "process", None) != os.getpid():
            self._opened.file, self._opened.process = self.path.open("rb"), os.getpid()
        file: BinaryIO = self._opened.file
        return file


def _member(entry: zipfile.ZipInfo) -> tuple[int, int, int, int, int, bool]:
    locked = bool(entry.flag_bits & 1)
    return entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, entry.compress_type & 0xFF, locked


def _unpacked(packed: bytes, member: np.void) -> bytes:
    if member["locked"]:
        raise zipfile.BadZipFile("it is encrypted")
    if member["method"] not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"it is compressed by method {member['method']}, not stored or deflated")
    # One byte more than the directory announces is enough to see that there is more.
    deflated = member["method"] == zipfile.ZIP_DEFLATED
    content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, int(member["size"]) + 1) if deflated else packed
    if len(content) != member["size"]:
        raise zipfile.BadZipFile("it is truncated" if len(content) < member["size"] else "it is longer than the zip says")
    if zlib.crc32(content) != member["crc"]:
        raise zipfile.BadZipFile("its checksum is wrong")
    return content


def naturally_sorted(names: Iterable[str]) -> list[str]:
    """Names in an order that puts '2.png' before '10.png'."""
    names = list(names)
    layouts = {name.translate(_DIGITS) for name in names}
    # Where all names have their digits in the same places, as in EDM's zips, plain order is natural order. It needs no keys,
    # which would take more memory than the names.
    return sorted(names) if len(layouts) == 1 else sorted(names, key=natural_order)


def natural_order(name: str) -> tuple[list[tuple[str, int]], str]:
    """A sort key that puts '2.png' before '10.png'."""
    return [(text, int(number or 0)) for text, number in re.findall(r"([^0-9]*)([0-9]{0,18})", name)], name


def has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    """Whether a file's name ends in one of the suffixes, in any case, and is not hidden."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in suffixes


def name_in_store(store: Store, name: str) -> str:
    """'FILE in STORE', for a message of one line; a name with characters that do not print is quoted."""
    return f"{name if name.isprintable() else ascii(name)} in {store.path}"


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none."""
    return str(error).split("\n", 1)[0] or type(error).__name__
