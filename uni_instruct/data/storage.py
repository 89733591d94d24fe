"""Stores: a folder or a zip, whose files are read one by one and do not stay in memory."""

import os
import posixpath
import re
import stat
import struct
import threading
import tokenize
import unicodedata
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from uni_instruct.data.ignored_files import is_ignored
from uni_instruct.errors import FileFormatError
from uni_instruct.system.zip_entry import entry_name, entry_start

# Exceptions that zipfile, zlib, Pillow, NumPy and json raise for damaged files. Their parsers can fail in any way that Python
# code can.
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
_MEMBER = np.dtype([("offset", "i8"), ("packed", "i8"), ("size", "i8"), ("crc", "u4"), ("method", "u1"), ("encrypted", "?")])
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_MAX_FILE_BYTES = 2 << 30  # bytes; the largest image that Pillow opens has 1.4 GB, in 16 bits and four channels
_OTHER_METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz"}
# Names that begin at the root, or have a part that is empty, '.' or '..'.
_INDIRECT = re.compile(r"^/|//|(?:^|/)\.{1,2}(?:/|$)")
_DIGITS = str.maketrans("123456789", "000000000")


class Store(Protocol):
    """Files by name: a folder, a zip or tars."""

    path: Path
    repeated: list[str]
    special_files: list[str]
    folders: list[str]

    def names(self) -> list[str]:
        """Every file once, in any order: with forward slashes, relative to the store, in Unicode's NFC.

        Files that other programs left behind are ignored. Links to files that are already listed, and names that occur twice,
        are put into `repeated`. Pipes, sockets, devices, and links within zips and tars are put into `special_files`. `folders`
        are the folders that a zip or tar lists as entries, with a slash at the end.
        """
        ...

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        ...

    def head(self, name: str, size: int) -> bytes:
        """The file's first bytes, at most `size`."""
        ...


class FolderStore:
    """The files below a folder, also in folders that its links lead to. Each file counts once."""

    def __init__(self, path: Path):
        self.path = path
        self.repeated: list[str] = []
        self.special_files: list[str] = []
        self.folders: list[str] = []
        self._raw: dict[str, str] = {}  # NFC -> the name on disk, if they differ

    def names(self) -> list[str]:
        """Every file. Raises FileFormatError if a folder cannot be read."""
        self.repeated, self.special_files = [], []
        found: list[str] = []
        # The parent folders as well: a link to one of them would add everything beside this folder.
        seen = {_identity(folder) for folder in (self.path, *self.path.resolve().parents)}
        links = self._walk("", found, seen)
        files: set[tuple[int, int]] | None = None
        # Links come last, so that a file is listed under its own name, not under a link's.
        while links:
            link = links.pop()
            path = self.path / link
            if path.is_dir():
                if (place := _identity(path)) in seen:
                    self.repeated.append(f"{link}/")
                else:
                    seen.add(place)
                    links.extend(self._walk(f"{link}/", found, seen))
            elif path.is_file():
                files = {_identity(self.path / name) for name in found} if files is None else files
                if (place := _identity(path)) in files:
                    self.repeated.append(link)
                else:
                    files.add(place)
                    found.append(link)
            elif path.exists():
                self.special_files.append(link)
            else:
                found.append(link)  # a broken link: reading it raises the error
        return [self._normal(name) for name in found]

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        _check_size(self._place(name).stat().st_size)
        return self._place(name).read_bytes()

    def head(self, name: str, size: int) -> bytes:
        """The file's first bytes."""
        with self._place(name).open("rb") as file:
            return file.read(size)

    def _place(self, name: str) -> Path:
        return self.path / self._raw.get(name, name)

    def _walk(self, start: str, found: list[str], seen: set[tuple[int, int]]) -> list[str]:
        """Add the files below `start` to `found` and the folders to `seen`. Returns the links in reverse order, as a stack."""
        links, folders = list[str](), [start]
        while folders:
            folder = folders.pop()
            try:
                entries = sorted(os.scandir(self.path / folder), key=lambda entry: entry.name)
            except OSError as error:
                problem = f"folder {self.path / folder} cannot be read: {os.strerror(error.errno or 0)}"
                raise FileFormatError(problem, remedy="make it readable, or remove it") from error
            for entry in entries:
                name = folder + entry.name
                if is_ignored(f"{name}/" if entry.is_dir() else name):
                    continue
                if entry.is_symlink():
                    links.append(name)
                elif entry.is_file():
                    found.append(name)
                elif not entry.is_dir():
                    self.special_files.append(name)  # reading a pipe could wait forever
                elif (place := _identity(Path(entry.path))) not in seen:
                    seen.add(place)
                    folders.append(f"{name}/")
        return sorted(links, reverse=True)

    def _normal(self, name: str) -> str:
        normal = name if name.isascii() else unicodedata.normalize("NFC", name)
        if normal == name or normal in self._raw or (self.path / normal).exists():
            return name  # unchanged if both forms of the name exist
        self._raw[normal] = name
        return normal


class ZipStore:
    """The members of a zip. Only their names and offsets stay in memory: some 110 bytes per member.

    `zipfile` keeps five times as much in every process that reads, and a data set may have a million members.
    """

    def __init__(self, path: Path):
        self.path = path
        self.repeated: list[str] = []
        self.special_files: list[str] = []
        self._opened = threading.local()
        try:
            with zipfile.ZipFile(path) as archive:
                entries = self._by_name(archive.infolist())
        except UNREADABLE as error:
            reason = reason_of(error).lower()
            raise FileFormatError(f"{path} is not a whole zip: {reason}", remedy="copy or prepare it again") from error
        self._names = [name for name, _ in entries]
        self.folders = [name for name in self._names if name.endswith("/")]
        self._members = np.fromiter((_member(entry) for _, entry in entries), _MEMBER, count=len(entries))
        self._check_packing()

    def names(self) -> list[str]:
        """Every member that is a file and not ignored."""
        return [name for name in self._names if not name.endswith("/")]

    def read(self, name: str) -> bytes:
        """The member's bytes, with their checksum verified. Raises BadZipFile if they are damaged."""
        member = self._member(name)
        return _unpacked(self._packed(member, int(member["packed"])), member)

    def head(self, name: str, size: int) -> bytes:
        """The member's first bytes. Their checksum is not verified."""
        member = self._member(name)
        # Deflate can make a few bytes longer, hence the 1,024 extra. Data that end within a block still give the bytes before.
        packed = self._packed(member, min(int(member["packed"]), size + 1024))
        return packed[:size] if member["method"] == zipfile.ZIP_STORED else zlib.decompressobj(-15).decompress(packed, size)

    def _check_packing(self) -> None:
        """Raise FileFormatError if no file can be unpacked. Then the zip is at fault, not a single file."""
        files = np.array([not name.endswith("/") for name in self._names], dtype=bool)
        encrypted, methods = self._members["encrypted"][files], set(self._members["method"][files].tolist())
        if files.any() and encrypted.all():
            raise FileFormatError(f"{self.path} is encrypted", remedy="unpack it with its password and give the folder")
        if methods and not methods & _METHODS:
            named = ", ".join(_OTHER_METHODS.get(method, f"method {method}") for method in sorted(methods))
            problem = f"{self.path} is compressed by {named}, which is not supported"
            raise FileFormatError(problem, remedy="unpack it and give the folder")

    def _by_name(self, infos: list[zipfile.ZipInfo]) -> list[tuple[str, zipfile.ZipInfo]]:
        """Members sorted by name, without ignored files. If two have one name, the last counts, as in programs that unpack."""
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            name = plain_name(entry_name(info))
            if is_ignored(name):
                continue
            if stat.S_ISLNK(info.external_attr >> 16):
                self.special_files.append(name)  # a link: its content is the name of another file
                continue
            if name in entries and not name.endswith("/"):
                self.repeated.append(name)
            entries[name] = info
        return sorted(entries.items())

    def _member(self, name: str) -> np.void:
        place = bisect_right(self._names, name) - 1
        if place < 0 or self._names[place] != name:
            raise KeyError(name)
        member: np.void = self._members[place]
        return member

    def _packed(self, member: np.void, size: int) -> bytes:
        file = self._own_handle()
        start, _ = entry_start(file, int(member["offset"]))
        file.seek(start)
        return file.read(size)

    def _own_handle(self) -> BinaryIO:
        """The zip, opened separately in each thread of each process, because an open file has one position."""
        if getattr(self._opened, "process", None) != os.getpid():
            self._opened.file, self._opened.process = self.path.open("rb"), os.getpid()
        file: BinaryIO = self._opened.file
        return file


def _member(entry: zipfile.ZipInfo) -> tuple[int, int, int, int, int, bool]:
    encrypted = bool(entry.flag_bits & 1)
    return entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, entry.compress_type & 0xFF, encrypted


def _unpacked(packed: bytes, member: np.void) -> bytes:
    if member["encrypted"]:
        raise zipfile.BadZipFile("it is encrypted")
    if member["method"] not in _METHODS:
        raise zipfile.BadZipFile(f"it is compressed by method {member['method']}, not stored or deflated")
    _check_size(int(member["size"]))
    deflated = member["method"] == zipfile.ZIP_DEFLATED
    # At most one byte more than the directory states is unpacked, which shows that there is more.
    content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, int(member["size"]) + 1) if deflated else packed
    if len(content) != member["size"]:
        raise zipfile.BadZipFile("it is truncated" if len(content) < member["size"] else "it is longer than the zip says")
    if zlib.crc32(content) != member["crc"]:
        raise zipfile.BadZipFile("its checksum is wrong")
    return content


def _check_size(size: int) -> None:
    """Raise ValueError if a file is too large to be an image, before it fills memory."""
    if size > _MAX_FILE_BYTES:
        raise ValueError(f"it has {size:,} bytes, more than the {_MAX_FILE_BYTES:,} that an image may have")


def plain_name(name: str) -> str:
    """A name as stores use it: forward slashes (some Windows programs write backslashes), relative to the top, in NFC.

    '/a', './a' and '../a' become 'a': they were written relative to another folder.
    """
    name = name.replace("\\", "/")
    # Simple searches first, because they are faster: there may be a million names, and few need the expression.
    if ("./" in name or "//" in name or name.startswith("/") or name.endswith("..")) and _INDIRECT.search(name):
        path = posixpath.normpath(name).lstrip("/")
        while path.startswith("../"):
            path = path[3:]
        name = ("" if path in (".", "..") else path) + "/" * name.endswith("/")
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _identity(path: Path) -> tuple[int, int]:
    """(device, inode), which two names of one file or folder share."""
    status = path.stat()
    return status.st_dev, status.st_ino


def naturally_sorted(names: Iterable[str]) -> list[str]:
    """Sort names in natural order, which puts '2.png' before '10.png'."""
    names = list(names)
    layouts = {name.translate(_DIGITS) for name in names}
    # If all names have their digits in the same places, as in EDM's zips, plain order is natural order. It needs no keys, which
    # would take more memory than the names.
    return sorted(names) if len(layouts) == 1 else sorted(names, key=natural_order)


def natural_order(name: str) -> tuple[list[tuple[str, int]], str]:
    """A sort key for natural order, which puts '2.png' before '10.png'."""
    return [(text, int(number or 0)) for text, number in re.findall(r"([^0-9]*)([0-9]{0,18})", name)], name


def has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    """Whether a file's name ends in one of the suffixes, in upper or lower case, and is not hidden."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in suffixes


def name_in_store(store: Store, name: str) -> str:
    """'FILE in STORE', for a message."""
    return f"{name} in {store.path}"


def reason_of(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has no message."""
    return str(error).split("\n", 1)[0] or type(error).__name__
