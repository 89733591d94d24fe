"""Pickles put together opcode by opcode: what no pickler would write, and what surrounds it in a checkpoint."""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

MAGIC, SYSTEM = 0x1950A86A20F9469CFC6C, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
FLOATS = b"ctorch\nFloatStorage\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a" + bytes([len(raw := pickle.encode_long(value))]) + raw


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def whole(*parts: bytes) -> bytes:
    """A pickle of protocol 4 without frames."""
    return b"\x80\x04" + b"".join(parts) + b"."


def call(module: str, attribute: str, argument: str = "touch never") -> bytes:
    return name(module, attribute) + text(argument) + b"\x85R"


def inside(*value: bytes) -> bytes:
    """A checkpoint with the value where a fact should be; behind it, a network that is fine."""
    return whole(b"}(", text("dataset_kwargs"), *value, text("ema"), network(), b"u")


def network(weight: bytes = b"") -> bytes:
    parts = {"_parameters": text("w") + (weight or tensor(stream(4))) + b"s", "_buffers": b"", "_modules": b""}
    state = b"".join(text(key) + b"}" + part for key, part in parts.items())
    meta = [("type", text("class")), ("version", b"K\x06"), ("module_src", text("1/0")), ("class_name", text("EDMPrecond"))]
    meta.append(("state", b"}(" + state + b"u"))
    fields = b"".join(text(key) + part for key, part in meta)
    return name("torch_utils.persistence", "_reconstruct_persistent_obj") + b"}(" + fields + b"u\x85R"


LOAD = name("torch.storage", "_load_from_bytes")


def tensor(
    storage: bytes,
    offset: bytes = b"K\x00",
    shape: bytes = b"K\x04\x85",
    strides: bytes = b"K\x01\x85",
    hooks: bytes = name("collections", "OrderedDict") + b")R",
) -> bytes:
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + offset + shape + strides + b"\x89" + hooks + b"tR"


def loaded(content: bytes) -> bytes:
    return LOAD + b"B" + struct.pack("<I", len(content)) + content + b"\x85R"


def stream(numel: int, value: bytes = b"", system: bytes = b"", keys: bytes = b"", end: bytes = b"") -> bytes:
    """A tensor's bytes as torch nests them; its parts can be replaced by others."""
    storage = b"(" + text("storage") + FLOATS + text("0") + text("cpu") + number(numel) + b"NtQ"
    parts = [whole(number(MAGIC)), whole(number(1001)), system or pickle.dumps(SYSTEM, 2), value or whole(storage)]
    end = end or struct.pack("<q", numel) + b"\0" * (4 * numel)
    return loaded(b"".join(parts) + (keys or pickle.dumps(["0"], 2)) + end)


def nested(depth: int, opening: bytes, closing: bytes) -> bytes:
    return opening * depth + b"N" + closing * depth


def doubled(times: int, start: bytes, step: bytes) -> bytes:
    """Every value holds the last one several times over: little to write, no end to read."""
    return b"](" + start + b"".join(b"q" + bytes([at]) + step.replace(b"@", b"h" + bytes([at])) for at in range(times)) + b"e"


def zipped(
    pickled: bytes, *, compress: int = zipfile.ZIP_STORED, entries: dict[str, bytes] | None = None
) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compress) as archive:
            archive.writestr("archive/data.pkl", pickled)
            for entry, content in ({"archive/data/0": b"\0" * 16} if entries is None else entries).items():
                archive.writestr(entry, content)

    return make


def stored(numel: bytes = b"K\x04", key: str = "0", kind: bytes = FLOATS) -> bytes:
    """The persistent id of a storage in a zip."""
    return b"(" + text("storage") + kind + text(key) + text("cpu") + numel + b"tQ"


def weights(value: bytes) -> bytes:
    return whole(b"}", text("w"), value, b"s")


def numpy_dtype(code: str, state: bytes = b"") -> bytes:
    plain = b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return name("numpy", "dtype") + text(code) + b"\x89\x88\x87R" + (state or plain)


def array(dtype: bytes, shape: bytes, content: bytes) -> bytes:
    made = name("numpy._core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
    return made + b"(K\x01" + shape + dtype + b"\x89" + content + b"tb"


def scalar(dtype: bytes, content: bytes) -> bytes:
    return name("numpy._core.multiarray", "scalar") + dtype + content + b"\x86R"


def safetensors(header: object, data: bytes = b"\0" * 16) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data
