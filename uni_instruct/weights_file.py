"""A bundle's weights: a file of safetensors, written and read one array after the other, so that memory holds them once."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from uni_instruct.errors import BundleError

# How a file stores matrices and filters -> safetensors' name and NumPy's.
WEIGHT_PRECISIONS = {"fp32": ("F32", "<f4"), "fp16": ("F16", "<f2")}
_DAMAGED = "copy the whole folder again"


def write_weights(path: Path, weights: Mapping[str, np.ndarray], precision: str = "fp32") -> None:
    """Arrays as safetensors, one after the other: safetensors' own `save` holds a second copy of them all."""
    # Biases and scales keep 32 bits: they are 1 % of the bytes, and on digits half of what rounding changes. They come first,
    # so that every array begins at a multiple of its own item size.
    stored = {name: WEIGHT_PRECISIONS[precision if array.ndim > 1 else "fp32"] for name, array in weights.items()}
    ordered = sorted(weights, key=lambda name: stored[name] == WEIGHT_PRECISIONS["fp16"])
    header, end = {}, 0
    for name in ordered:
        start, end = end, end + weights[name].size * np.dtype(stored[name][1]).itemsize
        header[name] = {"dtype": stored[name][0], "shape": list(weights[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(np.ascontiguousarray(weights[name], dtype=stored[name][1]).data)


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The arrays by name, float32. Raises BundleError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):  # which checks the header, and that the file is as long as it says
            pass
        return {name: array.astype(np.float32, copy=False) for name, array in _read_arrays(path)}
    except (SafetensorError, FileNotFoundError, TypeError) as error:
        raise BundleError(f"{path} cannot be read: {error}", remedy=_DAMAGED) from error


def _read_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of a sound file of safetensors. Raises TypeError for types that a bundle does not have.

    safetensors itself maps the file, whose pages then stand in memory beside all the arrays.
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
    """fp16 where the file holds matrices in half precision, else fp32. Raises BundleError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            types = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}", remedy=_DAMAGED) from error
    return "fp16" if WEIGHT_PRECISIONS["fp16"][0] in types else "fp32"
