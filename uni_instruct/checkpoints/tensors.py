"""Tensors as files store them: a flat storage of elements, and the place of a tensor in it (offset, shape, strides)."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uni_instruct.checkpoints.budget import UNSUPPORTED, Budget, MalformedFile, shown
from uni_instruct.checkpoints.source import Span

_MAX_DIMENSIONS = 32
_MAX_EMPTY_TENSOR = 1 << 20
_MAX_DIMENSION = 1 << 62


@dataclass(frozen=True)
class Element:
    """A type of element. stored: its dtype in the file. plain: its dtype in results. They differ for bfloat16 and bool."""

    name: str
    stored: np.dtype[Any]
    plain: np.dtype[Any]


def _element(name: str, code: str) -> Element:
    return Element(name, np.dtype(code), np.dtype(code))


FLOAT16, FLOAT32, FLOAT64 = (_element(f"float{8 * n}", f"<f{n}") for n in (2, 4, 8))
BFLOAT16 = Element("bfloat16", np.dtype("<u2"), np.dtype("<f4"))
INT8, INT16, INT32, INT64 = (_element(f"int{8 * n}", f"<i{n}") for n in (1, 2, 4, 8))
UINT8, UINT16, UINT32, UINT64 = (_element(f"uint{8 * n}", f"<u{n}") for n in (1, 2, 4, 8))
BOOL = Element("bool", np.dtype("u1"), np.dtype("?"))

# torch's globals for the types of storages.
STORAGE_TYPES = {
    "torch.HalfStorage": FLOAT16,
    "torch.BFloat16Storage": BFLOAT16,
    "torch.FloatStorage": FLOAT32,
    "torch.DoubleStorage": FLOAT64,
    "torch.CharStorage": INT8,
    "torch.ShortStorage": INT16,
    "torch.IntStorage": INT32,
    "torch.LongStorage": INT64,
    "torch.ByteStorage": UINT8,
    "torch.BoolStorage": BOOL,
}


class Storage:
    """A flat sequence of elements. Its place in the file (span) may become known later than the tensors that use it."""

    def __init__(self, budget: Budget, element: Element, numel: object, span: Span | None = None, crc: int | None = None):
        if type(numel) is not int or numel < 0:
            raise MalformedFile(f"has a storage of {shown(str(numel)[:20])} elements")
        budget.spend("bytes of storages", numel * element.stored.itemsize)
        self.element, self.numel, self.span, self.crc = element, numel, span, crc

    def read(self) -> np.ndarray:
        """The elements [numel], checked against the file's checksum if it has one."""
        if self.span is None or self.span.size != self.numel * self.element.stored.itemsize:
            raise MalformedFile("has a storage whose bytes are missing")
        stored = np.empty(self.numel, self.element.stored)
        self.span.read_into(stored)
        if self.crc is not None and zlib.crc32(stored.data) != self.crc:
            raise MalformedFile("has a storage that does not match its checksum")
        # A bfloat16 is the upper half of a float32, and NumPy has no type for it.
        if self.element is BFLOAT16:
            return np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
        # The byte of a bool may have any value in a file, but NumPy computes wrongly with values other than 0 and 1.
        return stored != 0 if self.element is BOOL else stored


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """The place of a tensor in its storage. Offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, flat: np.ndarray) -> np.ndarray:
        """The tensor, from its storage's elements: a view if it is all of them, else a copy."""
        numel = math.prod(self.shape)
        if not numel or self.strides == _contiguous(self.shape):
            # A small part is copied: a view would keep all of the storage in memory.
            part = flat[self.offset : self.offset + numel].reshape(self.shape)
            return part if numel == len(flat) else part.copy()
        steps = [stride * flat.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, steps).copy()


def stored_tensor(budget: Budget, storage: Storage, offset: object, shape: object, strides: object) -> StoredTensor:
    """A checked tensor; strides None: contiguous. Raises MalformedFile if it does not fit into its storage."""
    sizes = _sizes(shape, "shape")
    steps = _contiguous(sizes) if strides is None else _sizes(strides, "strides")
    if type(offset) is not int or offset < 0 or len(sizes) != len(steps):
        raise MalformedFile("has a tensor with broken strides")
    numel = math.prod(sizes)
    # No elements, but sizes such as [0, 2**60], which break code that multiplies the other sizes.
    if not numel and math.prod(max(size, 1) for size in sizes) > _MAX_EMPTY_TENSOR:
        raise MalformedFile("has an empty tensor of absurd size", UNSUPPORTED)
    last = offset + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    # A stride of 0 can repeat an element any number of times, so no tensor may have more elements than its storage.
    if numel and (numel > storage.numel or last >= storage.numel):
        raise MalformedFile(
            f"has a tensor of {numel:,} elements that reaches beyond its storage of {storage.numel:,}", UNSUPPORTED
        )
    budget.spend("bytes of tensors", numel * storage.element.plain.itemsize)
    # The stride of an axis with one element is never used, and files hold any number there.
    steps = tuple(plain if size < 2 else step for size, step, plain in zip(sizes, steps, _contiguous(sizes), strict=True))
    return StoredTensor(storage, offset, sizes, steps)


def _sizes(values: object, what: str) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > _MAX_DIMENSIONS:
        raise MalformedFile(f"has a tensor with a broken {what}")
    if any(type(value) is not int or not 0 <= value < _MAX_DIMENSION for value in values):
        raise MalformedFile(f"has a tensor with a broken {what}")
    return values


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor without gaps, last axis fastest."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
