"""Read and write a bundle's weights as safetensors, one array after the other, so that memory holds them only once."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from uni_instruct.errors import BundleError

# How matrices and convolution filters are stored -> the name of the type in safetensors and in NumPy.
WEIGHT_PRECISIONS = {"fp32": ("F32", "<f4"), "fp16": ("F16", "<f2")}
_DAMAGED = "copy or download the whole folder again"


def write_weights(path: Path, weights: Mapping[str, np.ndarray], precision: str = "fp32") -> None:
    """Write the arrays as safetensors. safetensors' own `save` would hold a second copy of all arrays in memory.

    precision: a key of WEIGHT_PRECISIONS, for arrays with more than one dimension.
    """
    # Biases and scales stay float32: they are 1 % of the bytes, and on digits half of the change that rounding makes. They are
    # written first, so that every array begins at a multiple of its item size.
    stored = {name: WEIGHT_PRECISIONS[precision if array.ndim > 1 else "fp32"] for name, array in weights.items()}
    ordered = sorted(weights, key=lambda name: stored[name] == WEIGHT_PRECISIONS["fp16"])
    header, end = {}, 0
    for name in ordered:
        start, end = end, end + weights[name].size * np.dtype(stored[name][1]).itemsize
        header[name] = {"dtype": stored[name][0], "shape": list(weights[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks that the data begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(np.ascontiguousarray(weights[name], dtype=stored[name][1]).data)


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name, as float32. Raises BundleError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # checks the header and the file's length
            pass
        return {name: array.astype(np.float32, copy=False) for name, array in _read_arrays(path)}
    except (SafetensorError, FileNotFoundError, TypeError) as error:
        raise BundleError(f"{path} cannot be read: {error}", remedy=_DAMAGED) from error


def _read_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and arrays of a valid safetensors file. Raises TypeError for a type that bundles do not use.

    safetensors itself maps the file, so that its pages take memory in addition to the arrays.
    """
    types = {**dict(WEIGHT_PRECISIONS.values()), "F64": "<f8"}
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.tell()
        for name, about in header.items():
            if name == "__metadata__":
                continue
            if about["dtype"] not in types:
                raise TypeError(f"{name} is {about['dtype']}")
            start, end = about["data_offsets"]
            file.seek(data + start)
            dtype = np.dtype(types[about["dtype"]])
            yield name, np.fromfile(file, dtype, (end - start) // dtype.itemsize).reshape(about["shape"])


def stored_precision(path: Path) -> str:
    """'fp16' if the file stores matrices in half precision, else 'fp32'. Raises BundleError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}", remedy=_DAMAGED) from error
    return "fp16" if WEIGHT_PRECISIONS["fp16"][0] in types else "fp32"
