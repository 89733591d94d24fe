"""The part of `inspect` for other projects' checkpoints, which are read but not imported."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from uni_instruct.system.file_type import CHECKPOINTS, INDEX, FileType, file_type

if TYPE_CHECKING:
    from uni_instruct.checkpoints.checkpoint import StoredNetwork

# A damaged file is recognised by its suffix only. Reading it then reports what is wrong.
_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".safetensors"})
# The name of a fact and the text to print. Facts without a row are in --json only.
Row = tuple[str, str]


def is_checkpoint(path: Path) -> bool:
    """Whether the path is a checkpoint's file: by its content, or by its suffix if the content is of no known type."""
    if not path.is_file():
        return False
    if path.name.endswith(INDEX):
        return True
    kind = file_type(path)
    return kind in CHECKPOINTS or (path.suffix.lower() in _SUFFIXES and kind in (FileType.OTHER, FileType.EMPTY))


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """Format, networks and facts of a checkpoint, for JSON. A network that cannot be imported has an `error`."""
    # Imported here, because `inspect` needs these modules for checkpoints only.
    from uni_instruct.checkpoints.checkpoint import read_checkpoint
    from uni_instruct.checkpoints.import_bundle import choose_network, likely_role

    checkpoint = read_checkpoint(path)
    chosen = choose_network(checkpoint, None)
    return {
        "kind": "checkpoint",
        "path": str(path),
        "file_bytes": path.stat().st_size,
        "format": checkpoint.format,
        "imported_as": likely_role(checkpoint, chosen),
        "imported_network": chosen.name,
        "networks": [_network_facts(stored) for stored in checkpoint.networks],
        "facts": checkpoint.facts,
    }


def checkpoint_rows(facts: dict[str, Any]) -> list[Row]:
    """A checkpoint's facts in words, and the command that imports it, if a network can be imported."""
    errors = {network["role"]: network.get("error") for network in facts["networks"]}
    chosen, path = facts["imported_network"], quote(facts["path"])
    others = [role for role, error in errors.items() if error is None]
    if errors[chosen] is None:
        end = [
            ("imported", f"network {chosen} as a {facts['imported_as']}; --network and --as choose otherwise"),
            ("next", f"uni-instruct import {path} --out BUNDLE"),
        ]
    elif others:
        command = f"uni-instruct import {path} --network {quote(others[0])} --out BUNDLE"
        end = [("imported", f"network {chosen} cannot be imported, but {', '.join(others)} can"), ("next", command)]
    else:
        end = [("imported", "no network of this file can be imported")]
    return [
        ("checkpoint", f"{facts['format']}, {facts['file_bytes'] / 1e6:.1f} MB"),
        *((f"network {network['role']}", _network_text(network)) for network in facts["networks"]),
        *((name, _short(value)) for name, value in facts["facts"].items()),
        *end,
    ]


def _network_facts(stored: "StoredNetwork") -> dict[str, Any]:
    from uni_instruct.checkpoints.state_dict_adapter import translate
    from uni_instruct.errors import UniInstructError

    facts = {
        "role": stored.name,
        "class": stored.class_name,
        "tensors": len(stored.tensors),
        "values": sum(array.size for array in stored.tensors.values()),
        "types": sorted({str(array.dtype) for array in stored.tensors.values()}),
    }
    # A training state may have a network of an unknown architecture beside one that can be imported. So an error is listed, and
    # does not end the command.
    try:
        translation = translate(stored)
    except UniInstructError as error:
        return {**facts, "error": str(error)}
    return {
        **facts,
        "image_shape": list(translation.image_shape),
        "num_classes": translation.num_classes,
        "network": translation.network,
        "network_args": translation.network_args,
        "left_out": list(translation.left_out),
    }


def _network_text(network: dict[str, Any]) -> str:
    size = f"{network['values']:,} values in {network['tensors']} tensors of {', '.join(network['types'])}"
    if "error" in network:
        return f"{network['class'] or 'bare weights'}, {size}; cannot be imported: {network['error']}"
    channels, height, width = network["image_shape"]
    classes = f"{network['num_classes']} classes" if network["num_classes"] else "no classes"
    what, args = f"{network['network']} of {width}x{height}x{channels}", _short(network["network_args"])
    return f"{network['class'] or 'bare weights'}: {what}, {classes}, {size}; {args}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(part)}" for key, part in value.items())[:400]
    return str(value)[:200]
