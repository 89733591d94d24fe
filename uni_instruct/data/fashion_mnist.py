"""Fashion-MNIST: 70,000 grey images of clothes, 28x28, 10 classes (Xiao et al. 2017, arXiv 1708.07747)."""

import gzip
import hashlib
import zlib
from dataclasses import replace
from pathlib import Path

from uni_instruct.data.dataset import Dataset
from uni_instruct.data.idx import idx_files, open_idx
from uni_instruct.system.download import download
from uni_instruct.system.files import cache_folder

NAME = "fashion-mnist"
CLASS_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
LICENCE = "MIT"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"

# SHA-256 of the unpacked files, because distributions compress them differently.
_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# SHA-256 of the labels. They distinguish Fashion-MNIST from MNIST, whose files have the same names.
_LABELS_SHA256 = {
    "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
}


def open_fashion_mnist(split: str = "train") -> Dataset:
    """Open a split from Debian's package `dataset-fashion-mnist`, else from the cache, else download it and check it.

    Raises RequestError if none of these works.
    """
    # The system's copy first: it needs no network and no space in the cache.
    if DEBIAN_FOLDER.is_dir():
        return with_fashion_mnist_names(open_idx(DEBIAN_FOLDER, split))
    folder = cache_folder() / NAME
    for name in idx_files(split):
        if not (folder / f"{name}.gz").is_file():
            _fetch(name, folder / f"{name}.gz")
    return with_fashion_mnist_names(open_idx(folder, split))


def with_fashion_mnist_names(dataset: Dataset) -> Dataset:
    """The data set with Fashion-MNIST's names and licence if its labels are Fashion-MNIST's; else unchanged."""
    labels = dataset.labels
    if labels is None or hashlib.sha256(labels.astype("u1").tobytes()).hexdigest() not in _LABELS_SHA256:
        return dataset
    return replace(dataset, name=NAME, num_classes=len(CLASS_NAMES), class_names=CLASS_NAMES, licence=LICENCE)


def _fetch(name: str, path: Path) -> None:
    def is_valid(content: bytes) -> bool:
        try:
            return hashlib.sha256(gzip.decompress(content)).hexdigest() == _SHA256[name]
        except (OSError, EOFError, zlib.error):
            return False

    remedy = "install Debian's dataset-fashion-mnist, or give a folder that holds the IDX files"
    download(f"{URL}/{name}.gz", path, is_valid, "Fashion-MNIST", remedy)
