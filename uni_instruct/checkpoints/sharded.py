"""Weights in several files with an index, as Hugging Face's libraries save large models."""

import hashlib
import json
import re
from pathlib import Path

from uni_instruct.checkpoints.budget import UNSUPPORTED, MalformedFile, reading, shown
from uni_instruct.checkpoints.source import Source, opened
from uni_instruct.system.file_type import INDEX
from uni_instruct.system.files import sha256

_MAX_INDEX_BYTES = 64 << 20
_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})(\.\w+)")


def is_index(path: Path) -> bool:
    """Whether a file is named as an index of several: model.safetensors.index.json, pytorch_model.bin.index.json."""
    return path.name.endswith(INDEX)


def parts_of(index: Path) -> list[Path]:
    """The files that an index names, in order. Raises MalformedFile if it is not an index, or if a file is not beside it."""
    with opened(index) as (file, _, size):
        if size > _MAX_INDEX_BYTES:
            raise MalformedFile(f"has {size:,} bytes, more than an index", UNSUPPORTED)
        content = Source(file, 0, size).read(size)
    try:
        places = json.loads(content.decode())["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MalformedFile("is not an index of weights: it has no weight_map of names and files", UNSUPPORTED) from error
    for name in names:
        # A part must be beside its index. Otherwise an index could have any file read.
        if not isinstance(name, str) or name != Path(name).name or not (index.parent / name).is_file():
            raise MalformedFile(f"names the part {shown(name)}, which is not beside it", "copy all parts beside it")
    return [index.with_name(name) for name in names]


def content_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex; for an index, of all its parts as well, because two networks may have the same index."""
    if not is_index(path):
        return sha256(path)
    with reading(str(path)):
        hashes = [sha256(part) for part in (path, *parts_of(path))]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def check_is_whole(name: str) -> None:
    """Raise MalformedFile if a file is named as one part of several."""
    match = _PART.fullmatch(Path(name).name)
    if match and int(match[3]) > 1:
        index = f"{match[1]}{match[4]}{INDEX}"
        raise MalformedFile(f"is part {int(match[2])} of {int(match[3])}", f"give {index}, with all parts beside it")
