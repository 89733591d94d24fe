"""Small data sets and files that tests make."""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from uni_instruct.data import ArrayReader, Dataset
from uni_instruct.data.dataset import number_names


def arrays_dataset(images: np.ndarray, labels: np.ndarray | None, num_classes: int = 0) -> Dataset:
    return Dataset(
        name="arrays",
        image_shape=(images.shape[3], *images.shape[1:3]),
        labels=labels,
        num_classes=num_classes,
        class_names=number_names(num_classes),
        licence="CC0-1.0",
        source="drawn",
        reader=ArrayReader(images),
    )


def all_images(dataset: Dataset) -> np.ndarray:
    return dataset.images(range(len(dataset)))


def png(pixels: np.ndarray | Image.Image, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zip_of(path: Path, files: dict[str, bytes], meta: object = None) -> Path:
    """Stored in the order given; `dataset.json` is left out without meta."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if meta is not None:
            archive.writestr("dataset.json", meta if isinstance(meta, str) else json.dumps(meta))
    return path


def grey_zip(path: Path, levels: Iterable[int], labels: list[object] | None = None, side: int = 4, **meta: object) -> Path:
    """Square grey images of one level each."""
    files = {f"00000/img{i:08d}.png": png(np.full((side, side), level, np.uint8)) for i, level in enumerate(levels)}
    named = None if labels is None else [list(pair) for pair in zip(files, labels, strict=True)]
    return zip_of(path, files, {"labels": named, **meta})


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, compress: bool = False) -> None:
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
