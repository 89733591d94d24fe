"""Read torch's own files (.pt, .pth) as the same plain values as pickles. torch itself is not needed.

torch.load(weights_only=True) refuses most of these training states, because they name classes of their projects. It also has no
limits: it returns a tensor of stride 0 of any size.
"""

import struct
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

from uni_instruct.checkpoints.budget import UNSUPPORTED, Budget, MalformedFile, shown
from uni_instruct.checkpoints.pickle.allowed_globals import CHECKPOINT
from uni_instruct.checkpoints.pickle.interpreter import PickleInterpreter
from uni_instruct.checkpoints.pickle.legacy_torch import persistent_storages
from uni_instruct.checkpoints.source import Source, Span
from uni_instruct.checkpoints.tensors import Element, Storage
from uni_instruct.system.zip_entry import entry_start

_MAX_DIRECTORY_BYTES = 4 << 20  # bytes; the 3,000 storages of a large training state take 0.3 million
# Exceptions that zipfile raises for a damaged directory.
_BROKEN_ZIP = (zipfile.BadZipFile, struct.error, NotImplementedError, EOFError, ValueError, OverflowError)
_RESAVE = "save it again with torch.save"


def zipped(file: BinaryIO, budget: Budget, size: int) -> object:
    """The value of torch's zip, with placeholders and stored tensors. Raises MalformedFile."""
    entries = _entries(file, size)
    folder = _folder(entries)
    if f"{folder}constants.pkl" in entries:
        raise MalformedFile("is a TorchScript program", "give a checkpoint that torch.save wrote")
    # Older files have no such entry. torch then assumes the machine's byte order.
    order = entries.get(f"{folder}byteorder")
    if order is not None and order.span.content(len(b"little") + 1) != b"little":
        raise MalformedFile("was written in an unknown byte order", _RESAVE)

    def storage(element: Element, key: str, numel: object) -> Storage:
        entry = entries.get(f"{folder}data/{key}")
        if entry is None:
            raise MalformedFile(f"lacks storage {shown(key)}")
        return Storage(budget, element, numel, entry.span, entry.crc)

    pickle = entries[f"{folder}data.pkl"]
    if pickle.crc is not None and pickle.span.crc() != pickle.crc:
        raise MalformedFile("has a pickle that does not match its checksum")
    with pickle.span.opened() as source:
        value = PickleInterpreter(source, budget, CHECKPOINT, persistent_storages(budget, {}, storage)).run()
        if source.position != source.end:
            raise MalformedFile(f"has {source.end - source.position:,} bytes after the end of its pickle")
    return value


@dataclass(frozen=True)
class _Entry:
    """The place of an entry's bytes, and their checksum if there is one."""

    span: Span
    crc: int | None


class _BoundedFile:
    """The file as zipfile sees it. A directory that is too large, or before the file's beginning, is refused.

    zipfile reads the directory in one piece, whatever length the file states.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.tell = file, file.tell

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset < 0:
            raise zipfile.BadZipFile("its directory is before its beginning")
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        most = _MAX_DIRECTORY_BYTES + 1
        data = self._file.read(most if size < 0 else min(size, most))
        if len(data) == most:
            raise MalformedFile("has a zip directory that is too large", UNSUPPORTED)
        return data


def _entries(file: BinaryIO, size: int) -> dict[str, _Entry]:
    """The zip's entries by name. They must be uncompressed, have different names, and not lead out of their folder."""
    try:
        infos = zipfile.ZipFile(_BoundedFile(file)).infolist()
    except _BROKEN_ZIP as error:
        raise MalformedFile(f"is not a whole zip: {shown(str(error))}") from error
    entries: dict[str, _Entry] = {}
    for info in infos:
        name = info.filename
        # Compressed entries could be a thousand times as large as the file, and tensors could not be read in place.
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise MalformedFile(f"has a compressed or encrypted entry {shown(name)}", f"{_RESAVE}, which stores plainly")
        # If two entries have one name, two readers may take different ones: one then checks what the other does not run.
        if name in entries:
            raise MalformedFile(f"has two entries {shown(name)}", UNSUPPORTED)
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise MalformedFile(f"has an entry {shown(name)} that leaves its folder", UNSUPPORTED)
        # torch writes zero if its user has turned checksums off.
        entries[name] = _Entry(_located(file, info, size), info.CRC or None)
    return entries


def _folder(entries: dict[str, _Entry]) -> str:
    """The folder of the pickle, with its slash. Every entry must be in it."""
    found = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise MalformedFile(
            "is a zip without a checkpoint in it (no data.pkl, or several)", "give a file that torch.save wrote"
        )
    folder = found[0].removesuffix("data.pkl")
    for name in entries:
        if not name.startswith(folder):
            raise MalformedFile(f"has an entry {shown(name)} outside {shown(folder)}", UNSUPPORTED)
    return folder


def _located(file: BinaryIO, info: zipfile.ZipInfo, size: int) -> Span:
    """The place of an entry's bytes by its own header, which must agree with the directory."""
    name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
    try:
        start, own_name = entry_start(file, min(max(info.header_offset, 0), size))
    except zipfile.BadZipFile:
        own_name = b""
    if own_name != name:
        raise MalformedFile(f"is not a whole zip: entry {shown(info.filename)} is not where its directory says")
    return Source(file, min(start, size), size).span(info.file_size)
