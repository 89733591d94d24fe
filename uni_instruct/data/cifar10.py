"""CIFAR-10 as its authors publish it for Python (Krizhevsky 2009): 60,000 colour images of 32x32 in ten classes.

It is a folder `cifar-10-batches-py` of pickles, or the archive of that folder. Nothing in the pickles is run.
"""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from uni_instruct.checkpoints.pickle.unpickle import read_pickle
from uni_instruct.data.dataset import ArrayReader, Dataset
from uni_instruct.data.storage import UNREADABLE, reason_of
from uni_instruct.errors import FileFormatError
from uni_instruct.system.file_type import FileType, file_type

FOLDER = "cifar-10-batches-py"
META = "batches.meta"
TRAIN, TEST = tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",)
_SHAPE = (3, 32, 32)
_REMEDY = "download cifar-10-python.tar.gz again"

_Read = Callable[[str], bytes]


def has_cifar10(path: Path) -> bool:
    """Whether a path is that folder, or its archive."""
    if path.is_dir():
        return (path / META).is_file() and (path / TRAIN[0]).is_file()
    if not path.is_file() or file_type(path) is not FileType.TAR:
        return False
    try:
        with tarfile.open(path) as archive:
            first = archive.next()
    except (*UNREADABLE, tarfile.TarError):
        return False
    return first is not None and first.name.removeprefix("./").partition("/")[0] == FOLDER


def open_cifar10(path: Path) -> Dataset:
    """The 50,000 training images, without the test images. Raises FileFormatError if files are missing or damaged."""
    if path.is_dir():
        return _dataset(path, lambda name: (path / name).read_bytes())
    try:
        with tarfile.open(path) as archive:
            members = {member.name.rpartition("/")[2]: member for member in archive if member.isfile()}

            def read(name: str) -> bytes:
                file = archive.extractfile(members[name])
                assert file is not None, "a file, as isfile says"
                return file.read()

            return _dataset(path, read)
    except tarfile.TarError as error:
        raise FileFormatError(f"{path} is not a whole archive: {reason_of(error)}", remedy=_REMEDY) from error


def _dataset(path: Path, read: _Read) -> Dataset:
    names = _values(path, META, read).get("label_names")
    parts = [_values(path, name, read) for name in TRAIN]
    images, labels = [part.get("data") for part in parts], [part.get("labels") for part in parts]
    try:
        pixels: np.ndarray = np.concatenate([np.asarray(part) for part in images]).reshape(-1, *_SHAPE).transpose(0, 2, 3, 1)
        class_ids = np.concatenate([np.array(part) for part in labels])
        class_names = tuple(str(name) for name in names)  # type: ignore[union-attr]
    except (ValueError, TypeError) as error:
        raise FileFormatError(f"{path} does not hold CIFAR-10's images and labels", remedy=_REMEDY) from error
    if pixels.dtype != np.uint8 or class_ids.dtype.kind != "i":
        raise FileFormatError(f"{path} holds {pixels.dtype} images and {class_ids.dtype} labels", remedy=_REMEDY)
    return Dataset(
        name="cifar10",
        image_shape=_SHAPE,
        labels=class_ids.astype(np.int64),
        num_classes=len(class_names),
        class_names=class_names,
        licence="unknown",
        source=str(path),
        reader=ArrayReader(np.ascontiguousarray(pixels)),
        note="the training images; the test images are left out",
    )


def _values(path: Path, name: str, read: _Read) -> dict[str, Any]:
    """A pickled dict. Its keys are decoded to text, because Python 2 wrote bytes."""
    try:
        content = read_pickle(io.BytesIO(read(name)))
    except KeyError as error:
        raise FileFormatError(f"{path} has no {name}", remedy=_REMEDY) from error
    except OSError as error:
        raise FileFormatError(f"{name} in {path} cannot be read: {reason_of(error)}", remedy=_REMEDY) from error
    except FileFormatError as error:
        raise FileFormatError(f"{name} in {path}: {error.problem}", remedy=_REMEDY) from error
    if not isinstance(content, dict):
        raise FileFormatError(f"{name} in {path} is not a dict", remedy=_REMEDY)
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): _texts(value) for key, value in content.items()}


def _texts(value: Any) -> Any:
    if isinstance(value, list):
        return [part.decode("latin1") if isinstance(part, bytes) else part for part in value]
    return value
