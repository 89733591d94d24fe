"""Read and write data sets: digits, Fashion-MNIST, emoji, image folders, EDM's and EDM2's zips, tars, arrays.

NumPy and Pillow are enough for all but `digits` (scikit-learn) and `emoji` (fontTools). Names are imported when they are first
used: code that only writes images does not need the readers, whose import takes a third of a command's start.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uni_instruct.data.checking import Findings, check_data
    from uni_instruct.data.dataset import ArrayReader, Dataset
    from uni_instruct.data.edm_zip import write_zip
    from uni_instruct.data.sources import DATASETS, is_data, open_dataset

__all__ = ["DATASETS", "ArrayReader", "Dataset", "Findings", "check_data", "is_data", "open_dataset", "write_zip"]

_HOMES = {
    "uni_instruct.data.checking": ("Findings", "check_data"),
    "uni_instruct.data.dataset": ("ArrayReader", "Dataset"),
    "uni_instruct.data.edm_zip": ("write_zip",),
    "uni_instruct.data.sources": ("DATASETS", "is_data", "open_dataset"),
}


def __getattr__(name: str) -> object:
    for module, names in _HOMES.items():
        if name in names:
            found: object = getattr(importlib.import_module(module), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
