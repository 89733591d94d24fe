"""Data sets in and out: digits, Fashion-MNIST, image folders, EDM's zip, arrays. NumPy and Pillow only."""

from uni_instruct.data.archive import write_zip
from uni_instruct.data.dataset import ArrayReader, Dataset
from uni_instruct.data.sources import DATASETS, open_dataset

__all__ = ["DATASETS", "ArrayReader", "Dataset", "open_dataset", "write_zip"]
