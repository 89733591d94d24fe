"""Detect a file's type by its content, since names mislead: pytorch_model.bin is a checkpoint, samples.dat may be an .npz."""

import zipfile
from enum import Enum
from pathlib import Path
from shlex import quote
from typing import BinaryIO

from uni_instruct.system.zip_entry import SIGNATURE, entry_start

_HEAD = 512
HEAD = 16  # bytes that `begins_as_image` and `begins_as_heic` need
# Remedies for photographs that Pillow does not read, and for files that Git LFS has not downloaded.
SAVE_HEIC = "save HEIC as JPEG or PNG, as photo programs and 'heif-convert in.heic out.jpg' do"
PULL_LFS = "fetch the files with 'git lfs pull'"
# Array names that tools of this field use in .npz files. A zip of .npy files with other names is a data set of latents.
_ARRAYS = frozenset({"arr_0", "images", "mu", "sigma", "mean", "cov", "pool_3", "feats", "class_ids", "labels"})
_TAR_AT, _TAR, _GZIP, _IDX = 257, b"ustar", b"\x1f\x8b", b"\x00\x00\x08"
_LAST_PROTOCOL = 5


class FileType(Enum):
    """Types of files that commands accept, or name in their errors. The values are the words for messages."""

    TORCH = "a checkpoint"
    PICKLE = "a pickle"
    SAFETENSORS = "a file of safetensors"
    NPZ = "an .npz"
    ZIP = "a zip"
    TAR = "a tar archive"
    IDX = "an IDX file"
    IMAGE = "an image"
    ARRAY = "a single array"
    TABLE = "a table or a container of arrays"
    PACKED = "a compressed file"
    LFS = "a pointer of Git LFS"
    EMPTY = "empty"
    OTHER = "none that is known here"


_LFS = b"version https://git-lfs"
# First bytes of NumPy's files; of Parquet, Arrow, HDF5 and MATLAB; of bzip2, xz, Zstandard, 7z and RAR, and of a gzip that is
# no tar.
_MAGIC = {
    b"\x93NUMPY": FileType.ARRAY,
    **dict.fromkeys((b"PAR1", b"ARROW1", b"\x89HDF\r\n", b"MATLAB 5"), FileType.TABLE),
    **dict.fromkeys((b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf", b"Rar!", _GZIP), FileType.PACKED),
    _LFS: FileType.LFS,
}
INDEX = ".index.json"  # ends the name of the index of weights in several files, as Hugging Face's libraries write it
# Ends of the names of files with weights.
WEIGHTS = (INDEX, ".safetensors", ".pt", ".pth", ".ckpt", ".pkl", ".bin")
CHECKPOINTS = frozenset({FileType.TORCH, FileType.PICKLE, FileType.SAFETENSORS})


def file_type(path: Path) -> FileType:
    """The type of an existing file. No code in it is run. A zip's directory is read only if its first entry does not decide."""
    with path.open("rb") as file:
        head, size = file.read(_HEAD), path.stat().st_size
        if head.startswith(SIGNATURE):
            return _type_of_zip(path, _first_entry(file))
    if not head:
        return FileType.EMPTY
    # Checked before pickles: safetensors files begin with a length, whose first bytes may equal a pickle's.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return FileType.SAFETENSORS
    if head[0] == 0x80 and len(head) > 1 and head[1] <= _LAST_PROTOCOL:
        return FileType.PICKLE
    if head[_TAR_AT:].startswith(_TAR) or head.startswith(_GZIP):
        return FileType.TAR if head[_TAR_AT:].startswith(_TAR) or _is_tar(path) else FileType.PACKED
    if head.startswith(_IDX):
        return FileType.IDX
    # A zip's directory is at its end, so other bytes may come before its first entry.
    if zipfile.is_zipfile(path):
        return FileType.ZIP
    if begins_as_image(head[:HEAD]):
        return FileType.IMAGE
    return next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), FileType.OTHER)


def import_of_weights(source: Path) -> str:
    """The command that imports weights of another project, from a file or a folder, an index first. '' if there are none."""
    paths = [source]
    if source.is_dir():
        below = (path for pattern in ("*", "*/*") for path in sorted(source.glob(pattern)))
        paths = sorted((path for path in below if path.name.endswith(WEIGHTS)), key=lambda path: not path.name.endswith(INDEX))
    path = next(filter(_holds_weights, paths), None)
    return "" if path is None else f"'uni-instruct import {quote(str(path))} --out BUNDLE'"


def _holds_weights(path: Path) -> bool:
    """Whether a file is an index, by its name, or a checkpoint, by its content: a .bin may be anything."""
    return path.is_file() and (path.name.endswith(INDEX) or file_type(path) in CHECKPOINTS)


def begins_as_image(head: bytes) -> bool:
    """Whether these first 16 bytes of a file are those of PNG, JPEG, GIF, TIFF, WebP, AVIF, JPEG 2000 or BMP."""
    boxes = (b"ftypavif", b"jP  \r\n\x87\n")
    begins = head.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*"))
    # A text may begin with "BM" too. In a BMP, four bytes after the size are reserved and zero.
    is_bmp = head.startswith(b"BM") and head[6:10] == bytes(4)
    return begins or is_bmp or head[8:12] == b"WEBP" or head[4:12] in boxes


def begins_as_lfs(head: bytes) -> bool:
    """Whether these first bytes of a file (at least 23) are those of a Git LFS pointer, the text in place of the real file."""
    return head.startswith(_LFS)


def begins_as_heic(head: bytes) -> bool:
    """Whether these first 16 bytes of a file are those of HEIC or HEIF, the format of phone photographs."""
    return head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def _first_entry(file: BinaryIO) -> str:
    try:
        return entry_start(file, 0)[1].decode("utf-8", "replace")
    except zipfile.BadZipFile:
        return ""


def _type_of_zip(path: Path, first: str) -> FileType:
    if first.endswith("/data.pkl"):
        return FileType.TORCH
    if first.lower().endswith((".png", ".jpg", ".jpeg")) or (first.endswith(".npy") and "/" in first):
        return FileType.ZIP
    # Only if the first entry does not decide it: reading the directory of a large data set takes seconds.
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # zipfile raises many types for a damaged directory; the code that opens the file next reports it
        return FileType.NPZ if path.suffix.lower() == ".npz" else FileType.ZIP
    if any(name.count("/") == 1 and name.endswith("/data.pkl") for name in names):
        return FileType.TORCH
    arrays = {name.removesuffix(".npy") for name in names if name.endswith(".npy") and "/" not in name}
    is_npz = len(arrays) == len(names) > 0 and (path.suffix.lower() == ".npz" or arrays & _ARRAYS)
    return FileType.NPZ if is_npz else FileType.ZIP


def _is_tar(path: Path) -> bool:
    import tarfile

    return tarfile.is_tarfile(path)
