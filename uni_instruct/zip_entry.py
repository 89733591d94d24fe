"""Where the bytes of a zip's entry begin. `zipfile` does not say, and keeps the whole directory in memory to read one."""

import struct
import zipfile
from typing import BinaryIO

SIGNATURE = b"PK\x03\x04"
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
