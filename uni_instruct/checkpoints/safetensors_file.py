"""Safetensors (github.com/huggingface/safetensors): a header in JSON, then the bytes of every tensor."""

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from uni_instruct.bundle import CONFIG
from uni_instruct.checkpoints import tensors
from uni_instruct.checkpoints.budget import UNSUPPORTED, Budget, Limits, MalformedFile, reading, shown
from uni_instruct.checkpoints.source import Source, Span, opened
from uni_instruct.checkpoints.tensors import Storage, stored_tensor

_MAX_HEADER_BYTES = 4 << 20
_MAX_CONFIG_BYTES = 1 << 20
_ELEMENTS = {
    "BOOL": tensors.BOOL,
    "I8": tensors.INT8,
    "I16": tensors.INT16,
    "I32": tensors.INT32,
    "I64": tensors.INT64,
    "U8": tensors.UINT8,
    "U16": tensors.UINT16,
    "U32": tensors.UINT32,
    "U64": tensors.UINT64,
    "F16": tensors.FLOAT16,
    "BF16": tensors.BFLOAT16,
    "F32": tensors.FLOAT32,
    "F64": tensors.FLOAT64,
}


def read_safetensors(source: str | Path, limits: Limits | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays by name, bfloat16 widened to float32; and the config.json beside the file, or {} if there is none.

    Raises FileFormatError if either is damaged.
    """
    from safetensors import SafetensorError, safe_open

    with opened(source) as (file, name, size), reading(name):
        budget = Budget(limits or Limits(), size)
        header, start = _header(file, budget, size)
        try:
            # Opened only for its checks (gaps, overlaps, sizes), because it cannot return bfloat16 to NumPy.
            with safe_open(str(source), framework="numpy"):
                pass
        except SafetensorError as error:
            raise MalformedFile(f"is not a whole safetensors file: {shown(str(error))}") from error
        arrays = {key: _array(file, budget, start, entry) for key, entry in header.items() if key != "__metadata__"}
    return arrays, _config(Path(source).with_name(CONFIG))


def looks_like_safetensors(file: BinaryIO, size: int) -> bool:
    """Whether the file begins like safetensors: with the length of a header, and a JSON object."""
    source = Source(file, 0, size)
    return size > 8 and source.unsigned(8) <= source.end - source.position and source.starts_with(b"{")


def _header(file: BinaryIO, budget: Budget, size: int) -> tuple[dict[str, Any], int]:
    """The header, and the offset of the tensors."""
    source = Source(file, 0, size)
    length = source.unsigned(8)
    if length > _MAX_HEADER_BYTES:
        raise MalformedFile(f"has a header of {length:,} bytes", UNSUPPORTED)
    budget.spend("bytes of text", length)
    return _json(source.read(length), "a header"), source.position


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with opened(path) as (file, name, size), reading(name):
        if size > _MAX_CONFIG_BYTES:
            raise MalformedFile(f"has {size:,} bytes, more than a configuration", UNSUPPORTED)
        return _json(Source(file, 0, size).read(size), "content")


def _json(content: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(content.decode())  # given bytes, json would guess their encoding
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"has {what} that is not JSON: {shown(str(error))}") from error
    if not isinstance(value, dict):
        raise MalformedFile(f"has {what} that is not a JSON object")
    return value


def _array(file: BinaryIO, budget: Budget, start: int, entry: Any) -> np.ndarray:
    """The tensor of one entry in the header."""
    # Checked again, although safetensors checked it: if a key occurs twice, it may have taken the other entry.
    values = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (values.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _ELEMENTS:
        raise MalformedFile(f"has a tensor of type {shown(dtype)}", "save it as float32, float16, bfloat16 or integers")
    if not isinstance(shape, list) or not isinstance(offsets, list) or [type(at) for at in offsets] != [int, int]:
        raise MalformedFile("has a header with a broken entry")
    first, last = offsets
    if not 0 <= first <= last <= budget.file_bytes - start:
        raise MalformedFile("has a header that points outside the file")
    element = _ELEMENTS[dtype]
    storage = Storage(budget, element, (last - first) // element.stored.itemsize, Span(file, start + first, last - first))
    return stored_tensor(budget, storage, 0, tuple(shape), None).of(storage.read())
