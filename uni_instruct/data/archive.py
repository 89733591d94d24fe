"""EDM's data set zip: images stored uncompressed, their classes in `dataset.json`.

`labels` there is [[file, class], ...] or null. EDM takes the largest class plus one for the number of classes; what it
ignores is added here: name, num_classes, class_names, licence, source.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from uni_instruct.data.dataset import MAX_CLASSES, READ_BATCH, Dataset, number_names
from uni_instruct.data.pictures import PictureReader, Store, ZipStore, is_picture, picture_shape
from uni_instruct.errors import FileFormatError
from uni_instruct.files import atomic_file
from uni_instruct.images import encode
from uni_instruct.progress import Progress

META = "dataset.json"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same data set gives the same bytes


def write_zip(dataset: Dataset, path: Path, progress: Progress | None = None) -> None:
    """Writes EDM's zip whole or not at all; progress is told the number of images written.

    Raises DiskError where it cannot be written, FileFormatError where an image cannot be read.
    """
    names = [f"{index // 1000:05d}/img{index:08d}.png" for index in range(len(dataset))]
    with atomic_file(Path(path)) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for start in range(0, len(dataset), READ_BATCH):
            part = names[start : start + READ_BATCH]
            images = dataset.images(np.arange(start, start + len(part)))
            for name, image in zip(part, images, strict=True):
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), encode(image, "png"))
            if progress:
                progress.advance(len(part))
        archive.writestr(zipfile.ZipInfo(META, _EPOCH), json.dumps(dataset_meta(dataset, names)))


def open_zip(path: Path, resolution: int | None = None) -> Dataset:
    """A zip that `write_zip`, EDM's or another tool wrote; without `dataset.json` it has no classes.

    Raises FileFormatError where it is corrupt, has no images, or its `dataset.json` does not fit them.
    """
    store = ZipStore(path)
    names = store.names()
    pictures = [name for name in names if is_picture(name)]
    if not pictures:
        raise FileFormatError(f"{path} has no images", remedy="give a zip of images, as 'data prepare' writes it")
    height, width, channels = picture_shape(store, pictures[0])
    size = (resolution, resolution) if resolution else (height, width)
    return Dataset(
        image_shape=(channels, *size),
        reader=PictureReader(store, pictures, size, channels, resize=resolution is not None),
        **described(store, pictures, has_meta=META in names),
    )


def described(store: Store, pictures: list[str], has_meta: bool) -> dict[str, Any]:
    """The fields of a Dataset that `dataset.json` tells; where there is none, those of images without classes."""
    meta = _read_meta(store) if has_meta else {}
    labels = _labels(store, meta.get("labels"), pictures)
    num_classes = 0 if labels is None else _num_classes(store, labels, meta.get("num_classes", 0))
    named = meta.get("class_names")
    class_names = tuple(str(name) for name in named) if isinstance(named, list) else ()
    return {
        "name": str(meta.get("name") or store.path.stem),
        "labels": labels,
        "num_classes": num_classes,
        "class_names": class_names if len(class_names) == num_classes else number_names(num_classes),
        "licence": str(meta.get("licence") or "unknown"),
        "source": str(store.path),
    }


def dataset_meta(dataset: Dataset, names: list[str]) -> dict[str, Any]:
    """What `dataset.json` says of the data set whose images have those file names."""
    labels = dataset.labels
    return {
        "name": dataset.name,
        "num_classes": dataset.num_classes,
        "class_names": dataset.class_names,
        "licence": dataset.licence,
        "source": dataset.source,
        "labels": None if labels is None else [[name, int(k)] for name, k in zip(names, labels, strict=True)],
    }


def _read_meta(store: Store) -> dict[str, Any]:
    try:
        meta = json.loads(store.read(META))
    except (ValueError, zipfile.BadZipFile) as error:
        raise FileFormatError(f"{META} in {store.path} is not JSON: {error}", remedy="prepare it again") from error
    if not isinstance(meta, dict):
        raise FileFormatError(f"{META} in {store.path} is not an object", remedy='write {"labels": [[file, class], ...]}')
    return meta


def _labels(store: Store, entries: Any, pictures: list[str]) -> np.ndarray | None:
    if entries is None:
        return None
    try:
        by_name = dict(entries)
        labels = [by_name[name] for name in pictures]
    except KeyError as error:
        raise FileFormatError(
            f"{META} in {store.path} has no label for {error.args[0]}", remedy="label every image, or write null"
        ) from error
    except (TypeError, ValueError) as error:
        raise FileFormatError(
            f"labels in {META} of {store.path} are not a list of [file, class]", remedy="write them so, or null"
        ) from error
    wrong = next((label for label in labels if type(label) is not int or not 0 <= label < MAX_CLASSES), None)
    if wrong is not None:
        raise FileFormatError(f"label {str(wrong)[:40]} in {META} of {store.path} is not a class", remedy="use integers from 0")
    return np.array(labels, dtype=np.int64)


def _num_classes(store: Store, labels: np.ndarray, stated: Any) -> int:
    """What is stated, or by the labels where that is more or nothing is."""
    if type(stated) is not int or not 0 <= stated <= MAX_CLASSES:
        raise FileFormatError(
            f"num_classes {str(stated)[:40]} in {META} of {store.path} is not a number of classes",
            remedy="leave it out, or write the number",
        )
    return max(int(labels.max()) + 1, stated)
