"""open_dataset: what a user may name as a data set."""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from uni_instruct.data.archive import open_zip
from uni_instruct.data.dataset import MAX_CLASSES, ArrayReader, Dataset, number_names
from uni_instruct.data.fashion_mnist import open_fashion_mnist, recognised
from uni_instruct.data.folder import open_folder
from uni_instruct.data.idx import has_idx, open_idx
from uni_instruct.data.pictures import fit
from uni_instruct.errors import FileFormatError, MissingExtraError, RequestError

_KINDS = "a zip, an .npz, a folder of images or a folder of IDX files"


def open_dataset(source: str | Path, resolution: int | None = None) -> Dataset:
    """A data set by name (DATASETS), or from a zip, an .npz of samples, a folder of images, or a folder of IDX files.

    resolution: centre-crop every image to a square and resize it to this many pixels. A name wins over a file or folder
    called so, unless that is written as a path ('./digits').
    Raises RequestError for an unknown source, FileFormatError for one that is corrupt or not what it was taken for.
    """
    if resolution is not None and not 1 <= resolution <= 4096:
        raise RequestError(f"resolution {resolution} is outside 1..4096", remedy="give pixels", param="resolution")
    if str(source) in DATASETS:
        return _resized(DATASETS[str(source)](), resolution)
    path = Path(source)
    if path.is_dir():
        return _resized(recognised(open_idx(path)), resolution) if has_idx(path) else open_folder(path, resolution)
    if not path.is_file():
        raise RequestError(
            f"there is no data set {source}", remedy=f"give one of {', '.join(DATASETS)}, or {_KINDS}", param="source"
        )
    if path.suffix.lower() == ".npz":
        return _resized(open_npz(path), resolution)
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return open_zip(path, resolution)
    raise FileFormatError(f"{path} is not a data set", remedy=f"give {_KINDS}", param="source")


def open_digits() -> Dataset:
    """scikit-learn's digits: 1,797 grey images of 8x8, their 17 levels spread over 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", extra="train") from error
    digits = load_digits()
    return Dataset(
        name="digits",
        image_shape=(1, 8, 8),
        labels=digits.target.astype(np.int64),
        num_classes=10,
        class_names=number_names(10),
        licence="CC-BY-4.0",
        source="scikit-learn (UCI Optical Recognition of Handwritten Digits)",
        reader=ArrayReader(np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, :, :, None]),
    )


def open_npz(path: Path) -> Dataset:
    """Samples as `generate` and ADM's tools write them: arr_0 uint8 [N, H, W, 1 or 3], class_ids int64 [N] if any."""
    arrays = read_npz(path, ("arr_0", "class_ids"))
    images, class_ids = arrays.get("arr_0"), arrays.get("class_ids")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        found = "no arr_0" if images is None else f"arr_0 of {images.dtype} {list(images.shape)}"
        raise FileFormatError(f"{path} has {found}", remedy="save the images as arr_0, uint8 [N, H, W, 1 or 3]")
    if class_ids is not None and (class_ids.dtype.kind not in "iu" or class_ids.ndim != 1 or not class_ids.size):
        raise FileFormatError(
            f"{path} has class_ids of {class_ids.dtype} {list(class_ids.shape)}", remedy="save them as integers [N]"
        )
    num_classes = 0 if class_ids is None else int(class_ids.max()) + 1
    if num_classes > MAX_CLASSES:
        raise FileFormatError(f"{path} has class id {num_classes - 1}", remedy=f"use ids below {MAX_CLASSES}")
    return Dataset(
        name=path.stem,
        image_shape=(images.shape[3], *images.shape[1:3]),
        labels=None if class_ids is None else class_ids.astype(np.int64),
        num_classes=num_classes,
        class_names=number_names(num_classes),
        licence="unknown",
        source=str(path),
        reader=ArrayReader(images),
    )


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an .npz holds; nothing in it is executed. Raises FileFormatError if corrupt."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise FileFormatError(f"{path} is not a whole .npz: {error}", remedy="write or copy it again") from error


def _resized(dataset: Dataset, resolution: int | None) -> Dataset:
    if resolution is None or dataset.image_shape[1:] == (resolution, resolution):
        return dataset
    shape = (dataset.image_shape[0], resolution, resolution)
    return replace(dataset, image_shape=shape, reader=_ResizedReader(dataset, resolution))


class _ResizedReader:
    def __init__(self, dataset: Dataset, resolution: int):
        self.dataset = dataset
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: np.ndarray) -> np.ndarray:
        return np.stack([fit(image, self.resolution) for image in self.dataset.images(indices)])


# Name -> how it is opened. The first is embedded in a dependency; the others may be downloaded.
DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits": open_digits,
    "fashion-mnist": open_fashion_mnist,
    "fashion-mnist-test": lambda: open_fashion_mnist("t10k"),
}
