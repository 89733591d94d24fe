"""Find where the bytes of a zip's entry begin. `zipfile` hides it, and loads the whole directory to read one entry."""

import struct
import zipfile
from typing import BinaryIO

SIGNATURE = b"PK\x03\x04"
_UTF8 = 0x800  # the flag that says that an entry's name is UTF-8
# An entry's header: the signature, 22 bytes that are in the directory too, and the lengths of the name and the extra fields.
_HEADER = struct.Struct("<4s22xHH")


def entry_start(file: BinaryIO, header_offset: int) -> tuple[int, bytes]:
    """The offset of an entry's bytes, and the name in the entry's own header at `header_offset`.

    Raises BadZipFile if there is no entry's header at that offset.
    """
    file.seek(header_offset)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(SIGNATURE):
        raise zipfile.BadZipFile("there is no entry at its offset in the zip")
    # Read from this header, not from the zip's directory, whose extra fields may have another length.
    _, name_size, extra_size = _HEADER.unpack(header)
    return header_offset + _HEADER.size + name_size + extra_size, file.read(name_size)


def entry_name(info: zipfile.ZipInfo) -> str:
    """An entry's name. macOS and older programs write UTF-8 without setting its flag, so zipfile decodes as code page 437."""
    if info.flag_bits & _UTF8 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename
