"""A folder of images: classes are its sub-folders, or what a `dataset.json` beside the images says."""

import os
from pathlib import Path

import numpy as np

from uni_instruct.data.archive import META, described
from uni_instruct.data.dataset import Dataset
from uni_instruct.data.pictures import FolderStore, PictureReader, common_shape, is_picture, natural_order
from uni_instruct.errors import FileFormatError


def open_folder(path: Path, resolution: int | None = None) -> Dataset:
    """The images below a folder, sorted by name. Every file's header is read at once, its pixels when asked for.

    Without `dataset.json`, images in sub-folders have those as classes, sorted; images beside each other have none.
    Raises FileFormatError where there are none, sizes are mixed (without a resolution), or a class is empty.
    """
    store = FolderStore(path)
    names = _picture_names(path)
    if not names:
        raise FileFormatError(f"{path} has no images", remedy="give a folder of images, or of one sub-folder for each class")
    height, width, channels = common_shape(store, names, any_size=resolution is not None)
    fields = described(store, names, has_meta=(path / META).is_file())
    if fields["labels"] is None and not (path / META).is_file():
        classes, labels = _classes(path, names)
        fields |= {"labels": labels, "num_classes": len(classes), "class_names": classes, "name": path.resolve().name}
    size = (resolution, resolution) if resolution else (height, width)
    reader = PictureReader(store, names, size, channels, resize=resolution is not None)
    return Dataset(image_shape=(channels, *size), reader=reader, **fields)


def _picture_names(path: Path) -> list[str]:
    """Names of the images, relative and with forward slashes, in natural order; hidden ones are passed over."""
    found: list[str] = []
    for folder, subfolders, files in os.walk(path, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = Path(folder).relative_to(path)
        found.extend((relative / name).as_posix() for name in files if is_picture(name))
    return sorted(found, key=natural_order)


def _classes(path: Path, names: list[str]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Class names and int64 labels [N] from the first part of each name; ((), None) where none is in a sub-folder."""
    parts = [name.split("/", 1) for name in names]
    loose = [name for name, part in zip(names, parts, strict=True) if len(part) == 1]
    if len(loose) == len(names):
        return (), None
    if loose:
        raise FileFormatError(
            f"{path} has images both in class folders and beside them ({loose[0]})",
            remedy="put every image into a class folder, or none",
        )
    classes = tuple(sorted({part[0] for part in parts}, key=natural_order))
    folders = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    empty = sorted(set(folders) - set(classes))
    if empty:
        raise FileFormatError(f"class folder {empty[0]} in {path} has no images", remedy="fill it or remove it")
    ids = {name: index for index, name in enumerate(classes)}
    return classes, np.array([ids[part[0]] for part in parts], dtype=np.int64)
