"""Data sets in and out: digits, Fashion-MNIST, emoji, image folders, EDM's and EDM2's zips, arrays. NumPy and Pillow only."""

from uni_instruct.data.checking import Findings, check_data
from uni_instruct.data.dataset import ArrayReader, Dataset
from uni_instruct.data.edm_zip import write_zip
from uni_instruct.data.sources import DATASETS, is_data, open_dataset

__all__ = ["DATASETS", "ArrayReader", "Dataset", "Findings", "check_data", "is_data", "open_dataset", "write_zip"]
