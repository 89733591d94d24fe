"""Where the bytes of a zip's entry begin. `zipfile` does not say, and keeps the whole directory in memory to read one."""

import struct
import zipfile
from typing import BinaryIO

SIGNATURE = b"PK\x03\x04"
_UTF8 = 0x800  # the flag of an entry that says that its name is UTF-8
# The signature, 22 bytes that the directory repeats, and the lengths of the name and of the extra fields behind it.
_HEADER = struct.Struct("<4s22xHH")


def entry_start(file: BinaryIO, header_offset: int) -> tuple[int, bytes]:
    """Where an entry's bytes begin, and the name in its own header, which stands at header_offset.

    Raises BadZipFile where no header stands there.
    """
    file.seek(header_offset)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(SIGNATURE):
        raise zipfile.BadZipFile("its place in the zip holds something else")
    # The directory cannot be asked: its own extra fields may be of another length.
    _, name_size, extra_size = _HEADER.unpack(header)
    return header_offset + _HEADER.size + name_size + extra_size, file.read(name_size)


def entry_name(info: zipfile.ZipInfo) -> str:
    """An entry's name. macOS and older programs write UTF-8 without the flag that says so; zipfile then reads code page 437."""
    if info.flag_bits & _UTF8 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename
