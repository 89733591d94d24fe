"""Small data sets and files that tests make."""

import gzip
import io
import struct
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


def write_idx(folder: Path, images: np.ndarray, labels: np.ndarray, compress: bool = False) -> None:
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
