"""What a checkpoint of any project holds: networks with their tensors and configuration, and facts about their training."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from uni_instruct.checkpoints.budget import UNSUPPORTED, Budget, Limits, MalformedFile, reading, shown
from uni_instruct.checkpoints.modules import config_of, is_network, plain_value, tensors_of
from uni_instruct.checkpoints.pickle.unpickle import StoredModule, pickled, plain
from uni_instruct.checkpoints.prefixes import is_counter, network_prefixes
from uni_instruct.checkpoints.safetensors_file import looks_like_safetensors, read_safetensors
from uni_instruct.checkpoints.sharded import check_is_whole, is_index, parts_of
from uni_instruct.checkpoints.source import Source, opened
from uni_instruct.checkpoints.torch_file import zipped
from uni_instruct.system.file_type import PULL_LFS, FileType, begins_as_lfs
from uni_instruct.system.zip_entry import SIGNATURE as ZIP

_PICKLE = b"\x80"
_HEAD = 32
# Part of the names of optimizer states, which hold tensors but no networks.
_OPTIMIZER = "optim"


@dataclass(frozen=True)
class StoredNetwork:
    """A network in a file. name: its name there, such as 'ema'. class_name: such as 'EDMPrecond', or '' for bare weights.

    config: the arguments and attributes in the file; for bare weights the config.json beside safetensors, else {}. tensors: by
    state-dict name.
    """

    name: str
    class_name: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """A file's networks, and its other content as plain values: data set, loss, augmentation, optimizers, progress."""

    format: str
    networks: tuple[StoredNetwork, ...]
    facts: dict[str, Any]


@dataclass(frozen=True)
class CheckpointFormat:
    """A file format: a dict with these keys. modules: whether its networks are modules, or bare weights."""

    name: str
    keys: frozenset[str]
    modules: bool


# A file has the first format whose keys it has, so formats with fewer keys come later. SiDA and Uni-Instruct write SiD's files,
# with weights in place of modules.
FORMATS = (
    CheckpointFormat("edm2 pickle", frozenset({"ema", "encoder", "dataset_kwargs", "loss_fn"}), modules=True),
    CheckpointFormat("edm pickle", frozenset({"ema", "loss_fn", "augment_pipe", "dataset_kwargs"}), modules=True),
    CheckpointFormat("sid training state", frozenset({"fake_score", "G", "G_ema"}), modules=True),
    CheckpointFormat("sid training state", frozenset({"fake_score_state", "G_state", "G_ema_state"}), modules=False),
    CheckpointFormat("edm training state", frozenset({"net", "optimizer_state"}), modules=True),
    CheckpointFormat("edm2 training state", frozenset({"net", "ema", "optimizer", "state"}), modules=False),
    CheckpointFormat("sid pickle", frozenset({"ema"}), modules=True),
    CheckpointFormat("modules", frozenset(), modules=True),
    CheckpointFormat("state dicts", frozenset(), modules=False),
)


def read_checkpoint(path: str | Path, limits: Limits | None = None) -> Checkpoint:
    """Read a file of EDM, EDM2, SiD, SiDA or Uni-Instruct, or bare weights: a state dict, safetensors, or an index of parts.

    A config.json beside safetensors is read too. Files are recognised by content, an index by its name; nothing in them is run.
    Raises RequestError if the file cannot be read; FileFormatError if it is damaged, not a checkpoint, contradicts itself,
    exceeds the limits, or names a global that is not allowed.
    """
    limits = limits or Limits()
    if is_index(Path(path)):
        return _joined(Path(path), limits)
    with opened(path) as (file, name, size), reading(name):
        check_is_whole(name)
        value, budget = _value(file, limits, size)
        if value is not None:
            return _checkpoint(value, budget)
    return _bare("safetensors", *read_safetensors(path, limits), budget)


def _value(file: BinaryIO, limits: Limits, size: int) -> tuple[object, Budget]:
    """The value of a pickle or of torch's file, None for safetensors; and the budget of the file."""
    budget = Budget(limits, size)
    read = _unpickler(file, size)
    return None if read is None else plain(read(file, budget, size), budget), budget


def _joined(index: Path, limits: Limits) -> Checkpoint:
    """The weights of all files that an index names. Raises as `read_checkpoint`, also if two files hold one weight."""
    with reading(str(index)):
        parts = parts_of(index)
        budget = Budget(limits, sum(part.stat().st_size for part in parts))
        tensors: dict[str, np.ndarray] = {}
        config: dict[str, Any] = {}
        for part in parts:
            with opened(part) as (file, name, size), reading(name):
                found, _ = _value(file, limits, size)
            if found is None:
                found, config = read_safetensors(part, limits)
            if not _is_weights(found) or tensors.keys() & found.keys():
                raise MalformedFile(
                    f"names the part {part.name}, which holds no weights, or weights that another part has too", UNSUPPORTED
                )
            tensors |= found
        return _bare("sharded weights", tensors, config, budget)


def _bare(form: str, tensors: dict[str, np.ndarray], config: dict[str, Any], budget: Budget) -> Checkpoint:
    """The checkpoint of bare weights and a configuration: one network, or several if the names of the weights separate them."""
    parts = [(part.name, part.stored) for part in _split_networks("", "weights", tensors)]
    networks = (StoredNetwork(name, "", config, _weights(stored, budget)) for name, stored in parts if isinstance(stored, dict))
    return Checkpoint(form, tuple(networks), {})


def read_plain(path: str | Path, limits: Limits | None = None) -> object:
    """The value of a pickle or of torch's file, whatever it holds, as from `read_pickle`. Raises as `read_checkpoint`."""
    with opened(path) as (file, name, size), reading(name):
        value, _ = _value(file, limits or Limits(), size)
        if value is None:
            raise MalformedFile("is a file of safetensors", UNSUPPORTED)
        return value


def _unpickler(file: BinaryIO, size: int) -> Callable[[BinaryIO, Budget, int], object] | None:
    """The function that reads the file, by its first bytes; None for safetensors. Raises MalformedFile for other files."""
    if Source(file, 0, size).starts_with(ZIP):
        return zipped
    # Checked before pickles: a safetensors file begins with a length, whose first byte may equal a pickle's.
    if looks_like_safetensors(file, size):
        return None
    if Source(file, 0, size).starts_with(_PICKLE):
        return pickled
    if begins_as_lfs(Source(file, 0, size).read(min(size, _HEAD))):
        raise MalformedFile(f"is {FileType.LFS.value}", PULL_LFS)
    raise MalformedFile("is not a checkpoint: neither a pickle, nor torch's zip, nor safetensors", UNSUPPORTED)


def _checkpoint(value: object, budget: Budget) -> Checkpoint:
    if is_network(value):
        return Checkpoint("module", (_network("module", value, budget),), {})
    if not isinstance(value, dict):
        raise MalformedFile(f"holds a {type(value).__name__}, not a checkpoint", UNSUPPORTED)
    if _is_weights(value):
        parts = _split_networks("", "weights", value)
        return Checkpoint("state dict", tuple(_network(part.name, part.stored, budget) for part in parts), {})
    found = _with_unique_names(list(_found(value)))
    networks = tuple(_network(part.name, part.stored, budget) for part in found)
    if not networks or len({network.name for network in networks}) < len(networks):
        raise MalformedFile("holds two networks of one name" if networks else "holds no network", UNSUPPORTED)
    modules = any(isinstance(part.stored, StoredModule) for part in found)
    name = next(form.name for form in FORMATS if form.keys <= value.keys() and form.modules == modules)
    taken = {part.key for part in found}
    return Checkpoint(name, networks, {str(key): _fact(part) for key, part in value.items() if key not in taken})


@dataclass(frozen=True)
class _Found:
    """A network below `key` of the file's dict. name: its nearest key; for one of several averages, also the width."""

    key: object
    name: str
    stored: StoredModule | dict[str, np.ndarray]


def _found(value: dict[Any, Any]) -> Iterator[_Found]:
    """Yield modules and state dicts, also from nested dicts, and the averages of EDM2's states ({'emas': [], 'stds': []})."""
    for key, part in value.items():
        if isinstance(part, dict) and isinstance(part.get("emas"), list) and isinstance(part.get("stds"), list):
            if len(part["emas"]) != len(part["stds"]) or not all(map(_is_weights, part["emas"])):
                raise MalformedFile(f"has averages in {shown(key)} that do not fit their widths", UNSUPPORTED)
            for std, weights in zip(part["stds"], part["emas"], strict=True):
                yield _Found(key, f"{key} {std}", weights)
        else:
            yield from _networks_in(key, str(key), part)


def _with_unique_names(found: list[_Found]) -> list[_Found]:
    """Networks that have one name in several dicts of a file: the dict's name is added."""
    names = Counter(part.name for part in found)
    return [part if names[part.name] == 1 else replace(part, name=f"{part.key}.{part.name}") for part in found]


def _networks_in(key: object, name: str, part: object) -> Iterator[_Found]:
    """Yield the networks in a value, named by their nearest key: FastGen's {'model': {'net': ..., 'fake_score': ...}}."""
    if is_network(part) or _is_weights(part):
        yield from _split_networks(key, name, part)
    elif isinstance(part, dict) and _OPTIMIZER not in name.lower():
        # The recursion is bounded, because the budget limits how deep values nest.
        for inner, value in part.items():
            yield from _networks_in(key, str(inner), value)


def _split_networks(key: object, name: str, stored: StoredModule | dict[str, np.ndarray]) -> Iterator[_Found]:
    """Yield the network, or each network of a state dict that holds several under prefixes (Lightning's net., net_ema.).

    Other weights (of a loss, a metric) belong to other modules, and are named by the first part of their names.
    """
    prefixes = network_prefixes(stored) if isinstance(stored, dict) else []
    if not isinstance(stored, dict) or "" in prefixes or not prefixes:
        yield _Found(key, name, stored)
        return
    parts: dict[str, dict[str, np.ndarray]] = {}
    for at, array in stored.items():
        prefix = next((prefix for prefix in prefixes if at.startswith(prefix)), f"{at.partition('.')[0]}.")
        # A wrapper's counter does not belong to another module.
        parts.setdefault(prefix if prefix in prefixes or not is_counter(at) else prefixes[0], {})[at] = array
    for prefix in [*prefixes, *(other for other in parts if other not in prefixes)]:
        yield _Found(key, (prefix.rstrip(".") if len(parts) > 1 else "") or name, parts[prefix])


def _is_weights(value: object) -> TypeGuard[dict[str, np.ndarray]]:
    """Whether a value is a state dict: names and tensors, and at most counters beside them."""
    if not isinstance(value, dict) or not value or not all(isinstance(name, str) for name in value):
        return False
    others = [name for name, part in value.items() if not isinstance(part, np.ndarray)]
    return len(others) < len(value) and all(is_counter(name) and isinstance(value[name], int | float) for name in others)


def _network(name: str, stored: StoredModule | dict[str, np.ndarray], budget: Budget) -> StoredNetwork:
    if isinstance(stored, StoredModule):
        return StoredNetwork(name, stored.class_name, config_of(stored), _weights(tensors_of(stored), budget))
    return StoredNetwork(name, "", {}, _weights(stored, budget))


def _weights(tensors: dict[str, np.ndarray], budget: Budget) -> dict[str, np.ndarray]:
    """The tensors, counted against the budget. Counters that are plain numbers become arrays without dimensions.

    Raises MalformedFile if there are none, or if repeated tensors exceed the budget.
    """
    tensors = {name: array if isinstance(array, np.ndarray) else np.array(array) for name, array in tensors.items()}
    # Counted by name: one storage can have any number of names, at no cost in the file.
    if not tensors:
        raise MalformedFile("has a network without weights", UNSUPPORTED)
    budget.spend("bytes of networks", sum(array.nbytes for array in tensors.values()))
    return tensors


def _fact(value: object) -> object:
    """A plain value. Of an optimizer only the settings, without the moments and the list of parameters."""
    if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
        groups = value["param_groups"] if isinstance(value["param_groups"], list) else []
        settings = [
            {key: part for key, part in group.items() if key != "params"} for group in groups if isinstance(group, dict)
        ]
        return {"param_groups": plain_value(settings)}
    return plain_value(value)
