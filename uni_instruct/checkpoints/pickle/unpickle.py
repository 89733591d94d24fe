"""Read pickles as plain values: numbers, strings, containers, NumPy arrays, and a StoredModule for each module."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from uni_instruct.checkpoints.budget import UNSUPPORTED, Budget, Limits, MalformedFile, reading
from uni_instruct.checkpoints.pickle.allowed_globals import CHECKPOINT, ArrayPlaceholder, ModulePlaceholder
from uni_instruct.checkpoints.pickle.interpreter import PickleInterpreter
from uni_instruct.checkpoints.pickle.legacy_torch import MAGIC, read_stream
from uni_instruct.checkpoints.pickle.stand_in import StandIn
from uni_instruct.checkpoints.source import Source, opened
from uni_instruct.checkpoints.tensors import Storage, StoredTensor

# Arrays of at most this many elements are shown as lists, so their elements count as values.
SMALL = 64
_LEAVES = frozenset({str, bytes, int, float, bool, type(None), set, frozenset})


@dataclass(frozen=True)
class StoredModule:
    """An object whose class belongs to the writing project: the name of the class and the attributes, without any code."""

    class_name: str
    state: dict[str, Any]


def read_pickle(source: str | Path | BinaryIO, limits: Limits | None = None) -> object:
    """The value of a pickle, or of a torch file from before version 1.6. Nothing in it is run.

    Tensors and parameters become NumPy arrays, bfloat16 widened to float32; dicts of any kind become dict, modules
    StoredModule. Raises FileFormatError if the file is damaged, exceeds the limits, or names a global that is not allowed.
    """
    with opened(source) as (file, name, size), reading(name):
        budget = Budget(limits or Limits(), size)
        return plain(pickled(file, budget, size), budget)


def pickled(file: BinaryIO, budget: Budget, size: int) -> object:
    """The value of a pickle or of torch's stream of pickles, with placeholders and stored tensors. Raises MalformedFile."""
    source = Source(file, 0, size)
    value = PickleInterpreter(source, budget, CHECKPOINT).run()
    # torch's old files begin with a pickle of this number alone. The rest of the stream follows.
    if value == MAGIC and type(value) is int and source.position < size:
        return read_stream(source, budget, CHECKPOINT, magic_read=True)
    if source.position < size:
        raise MalformedFile(f"has {size - source.position:,} bytes after its end")
    return value


def plain(value: object, budget: Budget) -> object:
    """The value with placeholders and stored tensors replaced by what they represent.

    Raises MalformedFile, also for cycles and for values that are nested too deep.
    """
    return _Plain(budget).of(value, 0).value


@dataclass(frozen=True)
class _Converted:
    """A plain value, the number of values in it, and how deep its containers are nested."""

    value: Any
    count: int = 1
    height: int = 0


class _Plain:
    """Makes values plain. A value that occurs several times is converted once, and counted each time.

    Ten lists that each hold the previous one twice are a thousand values for code that walks them, so the limits are on that
    tree.
    """

    def __init__(self, budget: Budget):
        self._limits = budget.limits
        self._converted: dict[int, _Converted | None] = {}
        self._storages: dict[int, np.ndarray] = {}

    def of(self, value: Any, depth: int) -> _Converted:
        if type(value) in _LEAVES:
            return _Converted(value, 1 + len(value)) if isinstance(value, set | frozenset) else _Converted(value)
        convert = _CONVERTERS.get(type(value))
        if convert is None:
            raise MalformedFile(f"has {_described(value)} where data should be", UNSUPPORTED)
        known = self._converted.get(id(value), self)
        if known is None:
            raise MalformedFile("has a value that contains itself", UNSUPPORTED)
        if not isinstance(known, _Converted):
            # None while it is being converted: a value that is met again then contains itself.
            self._converted[id(value)] = None
            known = self._converted[id(value)] = convert(self, value, depth + 1)
        if known.count > self._limits.values:
            raise MalformedFile(f"asks for more than {self._limits.values:,} values", UNSUPPORTED)
        if depth + known.height > self._limits.depth:
            raise MalformedFile(f"nests values deeper than {self._limits.depth}", UNSUPPORTED)
        return known

    def container(self, parts: list[Any], depth: int, make: Callable[[list[Any]], Any]) -> _Converted:
        if depth > self._limits.depth:
            raise MalformedFile(f"nests values deeper than {self._limits.depth}", UNSUPPORTED)
        converted = [self.of(part, depth) for part in parts]
        height = 1 + max((part.height for part in converted), default=0)
        return _Converted(make([part.value for part in converted]), 1 + sum(part.count for part in converted), height)

    def tensor(self, tensor: StoredTensor) -> _Converted:
        storage = tensor.storage
        if id(storage) not in self._storages:
            self._storages[id(storage)] = storage.read()
        return _converted_array(tensor.of(self._storages[id(storage)]))


def _convert_dict(plain: _Plain, value: dict[Any, Any], depth: int) -> _Converted:
    return plain.container(list(value.values()), depth, lambda parts: dict(zip(value, parts, strict=True)))


def _convert_module(plain: _Plain, placeholder: ModulePlaceholder, depth: int) -> _Converted:
    if placeholder.state is None or not all(type(name) is str for name in placeholder.state):
        raise MalformedFile(f"has a module {placeholder.class_name} without a state", UNSUPPORTED)
    return plain.container([placeholder.state], depth, lambda parts: StoredModule(placeholder.class_name, parts[0]))


def _convert_array(plain: _Plain, placeholder: ArrayPlaceholder, depth: int) -> _Converted:
    if placeholder.array is None:
        raise MalformedFile("has a NumPy array without content")
    return _converted_array(placeholder.array)


def _converted_array(array: np.ndarray) -> _Converted:
    return _Converted(array, 1 + (array.size if array.size <= SMALL else 0))


def _described(value: object) -> str:
    if isinstance(value, StandIn):
        return f"the bare function or class {value.name}"
    return "a storage outside a tensor" if isinstance(value, Storage) else f"a {type(value).__name__}"


# The converter for each type. A type that is not listed does not belong in a checkpoint.
_CONVERTERS: dict[type, Callable[[_Plain, Any, int], _Converted]] = {
    dict: _convert_dict,
    list: lambda plain, value, depth: plain.container(value, depth, list),
    tuple: lambda plain, value, depth: plain.container(list(value), depth, tuple),
    ModulePlaceholder: _convert_module,
    ArrayPlaceholder: _convert_array,
    StoredTensor: lambda plain, value, depth: plain.tensor(value),
}
