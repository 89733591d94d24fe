"""The globals that a checkpoint may name, and the stand-in for each. Nothing of the named packages is imported or called."""

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from uni_instruct.checkpoints.budget import UNSUPPORTED, Budget, MalformedFile, shown
from uni_instruct.checkpoints.pickle.legacy_torch import read_stream
from uni_instruct.checkpoints.pickle.stand_in import AllowedGlobals, StandIn
from uni_instruct.checkpoints.source import Span
from uni_instruct.checkpoints.tensors import STORAGE_TYPES, Storage, StoredTensor, stored_tensor

_MAX_CLASS_NAME_LENGTH = 200
# Names of NumPy's dtypes in pickles. Text, dates, structures and objects do not belong in a checkpoint.
_DTYPES = {code: np.dtype(code) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")}
_PLAIN_DTYPE_STATE = (None, None, None, -1, -1, 0)  # no subarray, names or fields; no size, alignment or flags of its own
_MAX_DIMENSIONS = 32
_MAX_PARTS = 100
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")


@dataclass(eq=False)
class ModulePlaceholder:
    """A module, or another object whose class belongs to the writing project. It becomes a StoredModule."""

    class_name: str
    state: dict[Any, Any] | None = None


@dataclass(eq=False)
class ArrayPlaceholder:
    """A NumPy array. It has no content until BUILD sets its state."""

    array: np.ndarray | None = None


@dataclass(eq=False)
class DtypePlaceholder:
    """One of the NumPy dtypes of _DTYPES."""

    dtype: np.dtype[Any]


def _arguments(name: str, values: tuple[Any, ...], *types: type | tuple[type, ...]) -> tuple[Any, ...]:
    """The arguments, checked. Raises MalformedFile if their number or types are not the given ones."""
    if len(values) != len(types) or not all(isinstance(value, type_) for value, type_ in zip(values, types, strict=True)):
        given = ", ".join(type(value).__name__ for value in values[:10])
        raise MalformedFile(f"calls {name} with ({given})", UNSUPPORTED)
    return values


def _persistent_object(budget: Budget, values: tuple[Any, ...]) -> ModulePlaceholder:
    """An object of NVIDIA's persistent classes: a dict of 'type', 'version', 'module_src', 'class_name', 'state'."""
    # module_src is Python source, which NVIDIA's own reader runs. It is not used here.
    (meta,) = _arguments("_reconstruct_persistent_obj", values, dict)
    name, state = meta.get("class_name"), meta.get("state")
    if meta.get("type") != "class" or type(name) is not str or len(name) > _MAX_CLASS_NAME_LENGTH or not name.isidentifier():
        raise MalformedFile("has a persistent object without a class name", UNSUPPORTED)
    if type(state) is not dict:
        raise MalformedFile(f"has a module {name} without a state", UNSUPPORTED)
    return ModulePlaceholder(name, state)


def _ordered_dict(budget: Budget, values: tuple[Any, ...]) -> dict[Any, Any]:
    _arguments("OrderedDict", values)
    return {}


def _set(budget: Budget, values: tuple[Any, ...]) -> set[Any]:
    (items,) = _arguments("set", values, list)
    budget.spend("opcodes", len(items))
    if not all(type(item) is str for item in items):
        raise MalformedFile("has a set of other things than names", UNSUPPORTED)
    return set(items)


def _encode(budget: Budget, values: tuple[Any, ...]) -> bytes:
    """Bytes as protocol 2 writes them: text to be encoded as Latin-1."""
    text, encoding = _arguments("_codecs.encode", values, str, str)
    budget.spend("bytes of text", len(text))
    if encoding != "latin1":
        raise MalformedFile(f"encodes a text as {shown(encoding)}", UNSUPPORTED)
    try:
        return bytes(text.encode("latin1"))
    except UnicodeEncodeError as error:
        raise MalformedFile("encodes a text that has no such encoding", UNSUPPORTED) from error


def _path(budget: Budget, values: tuple[Any, ...]) -> str:
    """A path of pathlib as text, from its parts, of which the first may be the root."""
    parts = _arguments("a path", values, *([str] * min(len(values), _MAX_PARTS)))
    return "/".join(parts).replace("//", "/", 1)


def _namespace(budget: Budget, values: tuple[Any, ...]) -> ModulePlaceholder:
    _arguments("SimpleNamespace", values)
    return ModulePlaceholder("SimpleNamespace")


def _size(budget: Budget, values: tuple[Any, ...]) -> tuple[Any, ...]:
    (sizes,) = _arguments("torch.Size", values, tuple)
    return tuple(sizes)


def _device(budget: Budget, values: tuple[Any, ...]) -> str:
    kind, *index = _arguments("torch.device", values, str, *([int] * (len(values) == 2)))
    return ":".join(map(str, (kind, *index)))


def _load_from_bytes(budget: Budget, values: tuple[Any, ...]) -> Storage:
    (content,) = _arguments("_load_from_bytes", values, (Span, bytes))
    span = content if isinstance(content, Span) else Span(io.BytesIO(content), 0, len(content))
    with span.opened() as source:
        storage = read_stream(source, budget, _STORAGES_ONLY)
    if not isinstance(storage, Storage):
        raise MalformedFile("has a tensor whose stream holds no storage", UNSUPPORTED)
    return storage


def _tensor(budget: Budget, values: tuple[Any, ...]) -> StoredTensor:
    """Arguments: storage, offset, shape, strides, requires_grad, hooks, and in newer files a dict of metadata."""
    storage, offset, shape, strides, _, hooks, *special = _arguments(
        "_rebuild_tensor_v2", values, Storage, int, tuple, tuple, bool, dict, *([dict] * (len(values) == 7))
    )
    if hooks or any(special):
        raise MalformedFile("has a tensor with hooks or a special form", UNSUPPORTED)
    return stored_tensor(budget, storage, offset, shape, strides)


def _parameter(budget: Budget, values: tuple[Any, ...]) -> StoredTensor:
    tensor, _, hooks = _arguments("_rebuild_parameter", values, StoredTensor, bool, dict)
    if hooks:
        raise MalformedFile("has a parameter with hooks", UNSUPPORTED)
    assert isinstance(tensor, StoredTensor)
    return tensor


def _dtype(budget: Budget, values: tuple[Any, ...]) -> DtypePlaceholder:
    code, _, _ = _arguments("numpy.dtype", values, str, (bool, int), (bool, int))
    if code not in _DTYPES:
        raise MalformedFile(f"has an array of NumPy's type {shown(code)}", UNSUPPORTED)
    return DtypePlaceholder(_DTYPES[code])


def _scalar(budget: Budget, values: tuple[Any, ...]) -> int | float | bool:
    placeholder, content = _arguments("numpy's scalar", values, DtypePlaceholder, bytes)
    if len(content) != placeholder.dtype.itemsize:
        raise MalformedFile("has a NumPy scalar of the wrong size")
    number: int | float | bool = np.frombuffer(content, placeholder.dtype)[0].item()
    return number


def _empty_array(budget: Budget, values: tuple[Any, ...]) -> ArrayPlaceholder:
    class_, _, _ = _arguments("numpy's _reconstruct", values, StandIn, tuple, (bytes, str))
    if class_ is not _NDARRAY:
        raise MalformedFile(f"has an array of class {shown(class_.name)}", UNSUPPORTED)
    return ArrayPlaceholder()


def _array_from_buffer(budget: Budget, values: tuple[Any, ...]) -> ArrayPlaceholder:
    """A NumPy array as protocol 5 writes it."""
    content, placeholder, shape, order = _arguments("numpy's _frombuffer", values, bytes, DtypePlaceholder, tuple, str)
    return ArrayPlaceholder(_array(budget, placeholder, shape, order == "F", content))


def _build_array(budget: Budget, target: ArrayPlaceholder, state: object) -> None:
    if type(state) is not tuple or target.array is not None:
        raise MalformedFile("has a NumPy array with a broken state", UNSUPPORTED)
    _, shape, placeholder, by_columns, content = _arguments(
        "ndarray.__setstate__", state, int, tuple, DtypePlaceholder, bool, (bytes, str)
    )
    try:
        content = content.encode("latin1") if isinstance(content, str) else content  # as Python 2 wrote it
    except UnicodeEncodeError as error:
        raise MalformedFile("has a NumPy array whose content is text", UNSUPPORTED) from error
    target.array = _array(budget, placeholder, shape, by_columns, content)


def _array(
    budget: Budget, placeholder: DtypePlaceholder, shape: tuple[Any, ...], by_columns: bool, content: bytes
) -> np.ndarray:
    budget.spend("bytes of tensors", len(content))
    # Multiplied step by step, with each size bounded: the product of a long shape of large sizes would itself take forever.
    numel = 1
    for size in shape[: _MAX_DIMENSIONS + 1]:
        if type(size) is not int or not 0 < size <= len(content):
            raise MalformedFile("has a NumPy array with a broken shape")
        numel *= size
    if len(shape) > _MAX_DIMENSIONS or numel * placeholder.dtype.itemsize != len(content):
        raise MalformedFile("has a NumPy array with a broken shape")
    stored = np.frombuffer(content, "u1" if placeholder.dtype.kind == "b" else placeholder.dtype)
    flat = stored != 0 if placeholder.dtype.kind == "b" else stored
    return flat.reshape(shape, order="F" if by_columns else "C").copy()


def _build_dtype(budget: Budget, target: DtypePlaceholder, state: object) -> None:
    """Check the state, (version, byte order, ...). Only '>', big-endian, differs from the machines that this runs on."""
    if type(state) is not tuple or len(state) != 8 or state[1] not in ("<", "|", "=") or state[2:] != _PLAIN_DTYPE_STATE:
        raise MalformedFile("has a structured NumPy type, or one of another byte order", UNSUPPORTED)


def _build_module(budget: Budget, target: ModulePlaceholder, state: object) -> None:
    if target.state is not None or type(state) is not dict:
        raise MalformedFile(f"has a module {target.class_name} with a broken state", UNSUPPORTED)
    target.state = state


def _build_dict(budget: Budget, target: dict[Any, Any], state: object) -> None:
    """Drop a dict's attributes. EasyDict has none, and those of a state dict are the versions of its modules."""
    if type(state) is not dict or len(state) > 1 or (state and "_metadata" not in state):
        raise MalformedFile("has a dict with attributes", UNSUPPORTED)


def _functions() -> dict[str, StandIn]:
    scalar, empty = StandIn("numpy's scalar", call=_scalar), StandIn("numpy's _reconstruct", call=_empty_array)
    buffer, names = StandIn("numpy's _frombuffer", call=_array_from_buffer), StandIn("set", call=_set)
    path = StandIn("a path", call=_path)
    return {
        "torch_utils.persistence._reconstruct_persistent_obj": StandIn("persistent object", call=_persistent_object),
        "torch._utils._rebuild_tensor_v2": StandIn("torch._utils._rebuild_tensor_v2", call=_tensor),
        "torch._utils._rebuild_parameter": StandIn("torch._utils._rebuild_parameter", call=_parameter),
        "torch.storage._load_from_bytes": StandIn("torch.storage._load_from_bytes", call=_load_from_bytes, takes_span=True),
        "torch.nn.modules.container.ModuleDict": StandIn("ModuleDict", new=lambda: ModulePlaceholder("ModuleDict")),
        "dnnlib.util.EasyDict": StandIn("EasyDict", new=dict),
        "collections.OrderedDict": StandIn("OrderedDict", call=_ordered_dict),
        "builtins.set": names,
        "__builtin__.set": names,
        "_codecs.encode": StandIn("_codecs.encode", call=_encode),
        # Settings that training scripts keep beside weights.
        "argparse.Namespace": StandIn("argparse.Namespace", new=lambda: ModulePlaceholder("Namespace")),
        "types.SimpleNamespace": StandIn("types.SimpleNamespace", call=_namespace),
        **{f"pathlib{place}.{name}": path for place in ("", "._local") for name in _PATHS},
        "torch.Size": StandIn("torch.Size", call=_size),
        "torch.device": StandIn("torch.device", call=_device),
        "numpy.ndarray": _NDARRAY,
        "numpy.dtype": StandIn("numpy.dtype", call=_dtype),
        # NumPy 2 moved these functions; files of NumPy 1 name their former place.
        **{f"numpy.{core}.multiarray.scalar": scalar for core in ("core", "_core")},
        **{f"numpy.{core}.multiarray._reconstruct": empty for core in ("core", "_core")},
        **{f"numpy.{core}.numeric._frombuffer": buffer for core in ("core", "_core")},
    }


_NDARRAY = StandIn("numpy.ndarray")
_STORAGES_ONLY = AllowedGlobals(STORAGE_TYPES, {})
CHECKPOINT = AllowedGlobals(
    {**STORAGE_TYPES, **_functions()},
    {dict: _build_dict, ModulePlaceholder: _build_module, ArrayPlaceholder: _build_array, DtypePlaceholder: _build_dtype},
)
