"""IDX files, the format of MNIST and Fashion-MNIST: a big-endian header, then bytes. They may be gzipped."""

import gzip
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from uni_instruct.data.dataset import ArrayReader, Dataset, number_names
from uni_instruct.data.labels import first_label_note
from uni_instruct.data.storage import FolderStore, naturally_sorted
from uni_instruct.errors import FileFormatError
from uni_instruct.system.printable import counted

_UNSIGNED_BYTES = 0x08
_SPLITS = ("train", "t10k")
_BLOCK = 1 << 20


def idx_files(split: str) -> tuple[str, str]:
    """The names of a split's image and label files, without .gz."""
    return f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"


def has_idx(folder: Path) -> bool:
    """Whether a folder holds the image file of either split."""
    return any(_find(folder, idx_files(split)[0]) for split in _SPLITS)


def open_idx(folder: Path, split: str | None = None) -> Dataset:
    """A split of the IDX files in a folder: by default 'train', or 't10k' if only that is there.

    Raises FileFormatError if a file is missing, truncated, or of another format.
    """
    split = split or next((s for s in _SPLITS if _find(folder, idx_files(s)[0])), _SPLITS[0])
    images, labels = (read_idx(_require(folder, name)) for name in idx_files(split))
    if images.ndim != 3 or labels.ndim != 1 or not labels.size:
        raise FileFormatError(
            f"IDX files in {folder} have shapes {images.shape} and {labels.shape}",
            remedy="give images [N, H, W] and labels [N]",
        )
    num_classes = int(labels.max()) + 1
    return Dataset(
        name=folder.resolve().name,
        image_shape=(1, *images.shape[1:]),
        labels=labels.astype(np.int64),
        num_classes=num_classes,
        class_names=number_names(num_classes),
        licence="unknown",
        source=str(folder),
        reader=ArrayReader(images[:, :, :, None]),
        note=first_label_note(labels),
    )


def skipped_idx_note(folder: Path) -> str:
    """A note on the other files in a folder of IDX files, such as those for testing; '' if there are none."""
    split = next(split for split in _SPLITS if _find(folder, idx_files(split)[0]))
    read = {path.name for name in idx_files(split) if (path := _find(folder, name))}
    others = naturally_sorted(set(FolderStore(folder).names()) - read)
    return f"{counted(others, 'file')} skipped: not of the split '{split}'" if others else ""


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of bytes: uint8. Raises FileFormatError if it is not such a file or not complete."""
    with _content(path) as read:
        magic = read(4)
        if len(magic) < 4 or magic[:3] != bytes([0, 0, _UNSIGNED_BYTES]):
            raise FileFormatError(f"{path} is not an IDX file of bytes", remedy="download it again")
        sizes = read(4 * magic[3])
        if len(sizes) < 4 * magic[3]:
            raise FileFormatError(f"{path} is truncated", remedy="download it again")
        shape = struct.unpack(f">{magic[3]}I", sizes)
        # Computed in floats: with the sizes of a damaged header, integers would overflow.
        expected = int(np.prod(shape, dtype=np.float64))
        # At most one byte more than the header announces is read, which shows that there is more. A few compressed bytes may
        # unpack to gigabytes.
        content = b"".join(_blocks(read, expected + 1))
    if len(content) != expected:
        header = len(magic) + len(sizes)
        found = f"{header + len(content)} bytes" if len(content) < expected else "more bytes"
        raise FileFormatError(f"{path} has {found}, its header says {header + expected}", remedy="download it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _blocks(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    """At most `size` bytes, in blocks. A single read would allocate all that a damaged header announces."""
    while size > 0 and (block := read(min(size, _BLOCK))):
        size -= len(block)
        yield block


@contextmanager
def _content(path: Path) -> Iterator[Callable[[int], bytes]]:
    """Yields a function that reads bytes of a file, decompressed if gzipped. Raises FileFormatError if decompression fails."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file.read
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FileFormatError(f"{path} is not a whole gzip file: {error}", remedy="download it again") from error


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _require(folder: Path, name: str) -> Path:
    path = _find(folder, name)
    if path is None:
        raise FileFormatError(f"{folder} has no {name} or {name}.gz", remedy="copy all IDX files of the data set")
    return path
