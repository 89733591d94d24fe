"""Checkpoints of every format, damaged and twisted: a case is a form and a number, from which all its changes follow."""

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builders.checkpoints import (
    tiny_peer,
    write_edm2_pickle,
    write_edm2_state,
    write_edm_pickle,
    write_sid_state,
    write_torch,
)
from builders.pickles import LOAD, call, name, number, text

NETS = {role: tiny_peer(seed) for seed, role in enumerate(("fake_score", "G", "G_ema"))}


def write_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}, path)


FORMATS: dict[str, Callable[[Path], Any]] = {
    "EDM": lambda path: write_edm_pickle(path, NETS["G"]),
    "EDM, protocol 2": lambda path: write_edm_pickle(path, NETS["G"], 2),
    "EDM2": lambda path: write_edm2_pickle(path, NETS["G"]),
    "EDM2's state": lambda path: write_edm2_state(path, NETS["G"]),
    "SiD's state": lambda path: write_sid_state(path, NETS, modules=True),
    "SiD's old state": lambda path: write_sid_state(path, NETS, modules=True, legacy=True),
    "state dict": lambda path: write_torch(path, NETS["G"].state_dict()),
    "safetensors": write_safetensors,
}


# What may get into a pickle: every opcode there is, calls of what must not be called, values of every size.
OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]


PIECES = [
    call("os", "system", "true"),
    call("builtins", "exec", "1"),
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    LOAD,
    name("numpy._core.multiarray", "scalar"),
    name("torch.nn.modules.container", "ModuleDict") + b")\x81}b",
    name("collections", "OrderedDict") + b")R",
    *(number(value) for value in (-1, 0, 1, 1 << 31, 1 << 62, 1 << 100)),
    text("0"),
    text("storage"),
    text("a" * 1000),
    b"G" + struct.pack(">d", float("nan")),
    b"]", b"}", b")", b"(", b"N", b"\x88", b"\x85R", b"\x86R", b"tR", b"h\x00", b"h\x05", b"Q", b"\x94", b"b", b"s", b"u", b"e",
]  # fmt: skip


NAMES = [
    b"os",
    b"system",
    b"builtins",
    b"eval",
    b"_rebuild_parameter",
    b"ModuleDict",
    b"FloatStorage",
    b"HalfStorage",
    b"O8",
    b"f8",
]


SIZES = [0, 1, 2, 255, 256, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]


def mutated(originals: dict[str, bytes], form: str, seed: int) -> bytes:
    """The case of that number."""
    rng = np.random.default_rng([seed, list(FORMATS).index(form)])
    data = originals[form]
    other = originals[list(FORMATS)[rng.integers(len(FORMATS))]]
    changes = [MUTATIONS[rng.integers(len(MUTATIONS))] for _ in range(1 if rng.random() < 0.7 else int(rng.integers(2, 5)))]
    if not data.startswith(b"PK") or rng.random() < 0.3:
        return change_all(rng, data, other, changes)
    archive = zipfile.ZipFile(io.BytesIO(data))
    entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    target = next(entry for entry in entries if entry.endswith("data.pkl"))
    if rng.random() < 0.1:
        target = list(entries)[rng.integers(len(entries))]
    entries[target] = change_all(rng, entries[target], other, changes)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)
    return made.getvalue()


Random = np.random.Generator


Mutation = Callable[[Random, bytes, bytes], bytes]


def change_all(rng: Random, data: bytes, other: bytes, changes: list[Mutation]) -> bytes:
    for change in changes:
        data = change(rng, data, other) if len(data) > 20 else data
    return data


def flip_bits(rng: Random, data: bytes, other: bytes) -> bytes:
    made = bytearray(data)
    for at in rng.integers(len(data), size=rng.integers(1, 4)):
        made[at] ^= 1 << int(rng.integers(8))
    return bytes(made)


def truncate(rng: Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.integers(len(data))]


def overwrite(rng: Random, data: bytes, other: bytes) -> bytes:
    start, end = part(rng, data)
    return data[:start] + rng.bytes(end - start) + data[end:]


def delete(rng: Random, data: bytes, other: bytes) -> bytes:
    start, end = part(rng, data)
    return data[:start] + data[end:]


def repeat(rng: Random, data: bytes, other: bytes) -> bytes:
    start, end = part(rng, data)
    return data[:end] + data[start:end] * int(rng.integers(1, 50)) + data[end:]


def transplant(rng: Random, data: bytes, other: bytes) -> bytes:
    start, end = part(rng, other)
    at = rng.integers(len(data))
    return data[:at] + other[start:end] + data[at:]


def splice_piece(rng: Random, data: bytes, other: bytes) -> bytes:
    at, piece = opcode_at(rng, data), PIECES[rng.integers(len(PIECES))]
    return data[:at] + piece + data[at + len(piece) * int(rng.integers(2)) :]


def exchange_opcode(rng: Random, data: bytes, other: bytes) -> bytes:
    at = opcode_at(rng, data)
    return data[:at] + OPCODES[rng.integers(len(OPCODES))] + data[at + 1 :]


def repeat_opcodes(rng: Random, data: bytes, other: bytes) -> bytes:
    start, end = sorted(opcode_at(rng, data) for _ in range(2))
    return data[:end] + data[start:end] + data[end:]


def exchange_size(rng: Random, data: bytes, other: bytes) -> bytes:
    at = opcode_at(rng, data) + 1
    return data[:at] + struct.pack("<I", SIZES[rng.integers(len(SIZES))])[: rng.integers(1, 5)] + data[at + 4 :]


def exchange_name(rng: Random, data: bytes, other: bytes) -> bytes:
    found = [old for old in NAMES if old in data] or [data[:1]]
    old, new = found[rng.integers(len(found))], NAMES[rng.integers(len(NAMES))]
    for width, opening in ((1, b"\x8c"), (4, b"X")):
        data = data.replace(
            opening + len(old).to_bytes(width, "little") + old, opening + len(new).to_bytes(width, "little") + new
        )
    return data.replace(old + b"\n", new + b"\n")


MUTATIONS: list[Mutation] = [
    flip_bits,
    truncate,
    overwrite,
    delete,
    repeat,
    transplant,
    *[splice_piece, exchange_opcode, repeat_opcodes, exchange_size, exchange_name] * 2,
]


def part(rng: Random, data: bytes) -> tuple[int, int]:
    """A short stretch, sometimes a long one."""
    start = int(rng.integers(len(data)))
    return start, min(len(data), start + int(rng.integers(1, 40 if rng.random() < 0.8 else len(data))))


def opcode_at(rng: Random, data: bytes) -> int:
    """Where an opcode stands; anywhere, if there are none."""
    found = opcodes_of(data)
    return found[rng.integers(len(found))] if found else int(rng.integers(len(data)))


@lru_cache(maxsize=64)
def opcodes_of(data: bytes) -> list[int]:
    """Where opcodes stand, also those of the pickles that are nested in bytes or follow each other."""
    found: list[int] = []
    stretches = [(0, len(data))]
    while stretches and len(found) < 20_000:
        start, end = stretches.pop()
        try:
            for opcode, value, position in pickletools.genops(io.BytesIO(data[start:end])):
                found.append(start + (position or 0))
                if isinstance(value, bytes) and value.startswith(b"\x80"):
                    inner = data.index(value, start + (position or 0))
                    stretches.append((inner, inner + len(value)))
                if opcode.code == "." and data[found[-1] + 1 : found[-1] + 2] == b"\x80":
                    stretches.append((found[-1] + 1, end))
        except (ValueError, struct.error, UnicodeDecodeError, OverflowError):
            continue
    return found
