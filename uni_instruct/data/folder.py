"""A folder of images or latents: classes are its sub-folders, or what a `dataset.json` beside the images says."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from uni_instruct.data.dataset import Dataset
from uni_instruct.data.file_kinds import content_of, data_files, dataset_of
from uni_instruct.data.labels import META, read_description, read_meta
from uni_instruct.data.storage import FolderStore, natural_order
from uni_instruct.errors import FileFormatError

FOLDER_REMEDY = "give a folder of images, or of one sub-folder for each class"


def open_folder(path: Path, resolution: int | None = None) -> Dataset:
    """The images below a folder, sorted by name. Every file's header is read now, its pixels when they are asked for.

    Without `dataset.json`, images in sub-folders have those as classes, sorted; images beside each other have none.
    Raises FileFormatError where there are none, sizes are mixed (without a resolution), or a class is empty.
    """
    store = FolderStore(path)
    names = store.names()
    files, latents = data_files(store, names, FOLDER_REMEDY)
    # Every header: nobody has looked at a folder of photographs, and training would meet the odd one after hours.
    content = content_of(store, files, latents, resolution, every_header=True)
    description = read_description(store, files, read_meta(store, names))
    if META not in names:
        classes, labels = folder_classes(path, files)
        name = path.resolve().name  # '.' has no name of its own
        description = replace(description, labels=labels, num_classes=len(classes), class_names=classes, name=name)
    return dataset_of(content, description)


def folder_classes(path: Path, names: list[str]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """Class names and int64 labels [N] from the first part of each name; ((), None) where none is in a sub-folder.

    Raises FileFormatError where images lie beside class folders, or a class folder has none.
    """
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
