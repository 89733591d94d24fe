"""EDM's data set zip: uncompressed images, with their classes in `dataset.json`. EDM2's holds latents in place of images.

In `dataset.json`, `labels` is [[file, class], ...] or null; a class may also be a one-hot vector. EDM takes the largest class
plus one as the number of classes. This package adds fields that EDM ignores: name, image_shape, num_classes, class_names,
licence, source.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from uni_instruct.data.dataset import READ_BATCH, Dataset
from uni_instruct.data.file_kinds import AS_THEY_ARE, ImageForm, content_of, data_files, dataset_of, skipped_note
from uni_instruct.data.labels import META, Meta, read_description, read_meta
from uni_instruct.data.storage import ZipStore
from uni_instruct.data.vae_latents import moments_bytes
from uni_instruct.images import encode
from uni_instruct.system.files import atomic_file
from uni_instruct.system.progress import Progress

ZIP_REMEDY = "give a zip of images, as 'data prepare' writes it"
# The time of every entry, so that the same data set gives the same bytes. It is the earliest that a zip can store.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_zip(dataset: Dataset, path: Path, progress: Progress | None = None) -> None:
    """Write EDM's zip, or EDM2's for latents. The file is written completely or not at all. progress advances by one per image.

    Raises DiskError if the zip cannot be written, FileFormatError if an image cannot be read.
    """
    pattern, encoded = _LATENT if dataset.latents else _PICTURE
    names = [pattern.format(folder=index // 1000, index=index) for index in range(len(dataset))]
    with atomic_file(Path(path)) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for start in range(0, len(dataset), READ_BATCH):
            part = names[start : start + READ_BATCH]
            for name, image in zip(part, dataset.stored(np.arange(start, start + len(part))), strict=True):
                archive.writestr(zipfile.ZipInfo(name, _EPOCH), encoded(image))
            if progress:
                progress.advance(len(part))
        archive.writestr(zipfile.ZipInfo(META, _EPOCH), json.dumps(dataset_meta(dataset, names)))


def open_zip(path: Path, form: ImageForm = AS_THEY_ARE) -> Dataset:
    """Open a zip of `write_zip`, EDM's or EDM2's tool or another program. If `dataset.json` has no labels, folders are classes.

    Raises FileFormatError if the zip is corrupt or has no images, or if its `dataset.json` does not match them.
    """
    store = ZipStore(path)
    names = store.names()
    found = data_files(store, names, ZIP_REMEDY)
    meta = read_meta(store, names)
    # Sizes are not compared here: a zip may hold a million files, and the tool that wrote it checked them. A wrong size is an
    # error when the image is read.
    content = content_of(store, found, form, every_header=False, stated=stated_channels(meta))
    description = read_description(store, found.files, meta)
    unlabelled = description.labels is None and not meta.has_labels
    return dataset_of(content, description, skipped_note(found, store, unlabelled))


def stated_channels(meta: Meta) -> int | None:
    """The channels of the image shape in `dataset.json`; None if it states none."""
    shape = meta.content.get("image_shape")
    return shape[0] if isinstance(shape, list) and len(shape) == 3 and shape[0] in (1, 3) else None


def dataset_meta(dataset: Dataset, names: list[str]) -> dict[str, object]:
    """The content of `dataset.json` for a data set whose images have these file names."""
    labels = dataset.labels
    return {
        "name": dataset.name,
        "image_shape": list(dataset.image_shape),
        "num_classes": dataset.num_classes,
        "class_names": dataset.class_names,
        "licence": dataset.licence,
        "source": dataset.source,
        "labels": None if labels is None else [[name, int(k)] for name, k in zip(names, labels, strict=True)],
    }


# File names as EDM's and EDM2's tools write them, with the functions that encode a file.
PICTURE_NAME = "{folder:05d}/img{index:08d}.png"
_PICTURE: tuple[str, Callable[[np.ndarray], bytes]] = (PICTURE_NAME, encode)
_LATENT: tuple[str, Callable[[np.ndarray], bytes]] = ("{folder:05d}/img-mean-std-{index:08d}.npy", moments_bytes)
