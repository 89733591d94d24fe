"""What a checkpoint holds, whoever wrote it: networks with their tensors and configuration, and facts about their training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from uni_instruct.checkpoints.budget import FOREIGN, Budget, Limits, MalformedFile, reading, shown
from uni_instruct.checkpoints.modules import config_of, is_network, plain_value, tensors_of
from uni_instruct.checkpoints.pickle.unpickle import StoredModule, pickled, plain
from uni_instruct.checkpoints.safetensors_file import looks_like_safetensors, read_safetensors
from uni_instruct.checkpoints.source import Source, opened
from uni_instruct.checkpoints.torch_file import ZIP, zipped

_PICKLE = b"\x80"


@dataclass(frozen=True)
class StoredNetwork:
    """A network in a file. role: its name there, such as 'ema'. class_name: such as 'EDMPrecond', '' for bare weights.

    config: the arguments and attributes that the file gives, {} for bare weights. tensors: by state-dict name.
    """

    role: str
    class_name: str
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """A file's networks, and what else it says in plain values: data set, loss, augmentation, optimizers, progress."""

    format: str
    networks: tuple[StoredNetwork, ...]
    facts: dict[str, Any]


@dataclass(frozen=True)
class CheckpointFormat:
    """A kind of file: a dict with these keys, among which the networks are modules or bare weights."""

    name: str
    keys: frozenset[str]
    modules: bool


# The first whose keys are all there. SiDA and Uni-Instruct write SiD's files; theirs hold weights where SiD's hold modules.
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
    """What a file of EDM, EDM2, SiD, SiDA or Uni-Instruct holds, or one of bare weights: a state dict, or safetensors.

    A config.json beside the latter is read too. The file is recognised by content, not by name; nothing in it is run. Raises
    RequestError where it cannot be read, FileFormatError where it is damaged, no checkpoint, contradicts itself, exceeds the
    limits, or names something foreign.
    """
    limits = limits or Limits()
    with opened(path) as (file, name, size), reading(name):
        budget = Budget(limits, size)
        kind = _kind(file, size)
        if kind is not read_safetensors:
            return _checkpoint(plain(kind(file, budget, size), budget), budget)
    tensors, config = read_safetensors(path, limits)
    with reading(name):
        return Checkpoint("safetensors", (StoredNetwork("weights", "", config, _weights(tensors, budget)),), {})


def _kind(file: BinaryIO, size: int) -> Callable[..., Any]:
    if Source(file, 0, size).starts_with(ZIP):
        return zipped
    if looks_like_safetensors(file, size):  # first: its length may begin with a pickle's first byte
        return read_safetensors
    if Source(file, 0, size).starts_with(_PICKLE):
        return pickled
    raise MalformedFile("is no checkpoint: neither a pickle, nor torch's zip, nor safetensors", FOREIGN)


def _checkpoint(value: Any, budget: Budget) -> Checkpoint:
    if is_network(value):
        return Checkpoint("module", (_network("module", value, budget),), {})
    if type(value) is not dict:
        raise MalformedFile(f"holds a {type(value).__name__}, no checkpoint", FOREIGN)
    if _is_weights(value):
        return Checkpoint("state dict", (_network("weights", value, budget),), {})
    found = list(_found(value))
    networks = tuple(_network(part.role, part.stored, budget) for part in found)
    if not networks or len({network.role for network in networks}) < len(networks):
        raise MalformedFile("holds two networks of one name" if networks else "holds no network", FOREIGN)
    modules = any(isinstance(part.stored, StoredModule) for part in found)
    name = next(form.name for form in FORMATS if form.keys <= value.keys() and form.modules == modules)
    taken = {part.key for part in found}
    return Checkpoint(name, networks, {str(key): _fact(part) for key, part in value.items() if key not in taken})


@dataclass(frozen=True)
class _Found:
    """A network under a key of the file's dict."""

    key: Any
    role: str
    stored: StoredModule | dict[str, np.ndarray]


def _found(value: dict[Any, Any]) -> Iterator[_Found]:
    """Modules and state dicts, and the several averages of EDM2's training states."""
    for key, part in value.items():
        if is_network(part) or _is_weights(part):
            yield _Found(key, str(key), part)
        elif isinstance(part, dict) and isinstance(part.get("emas"), list) and isinstance(part.get("stds"), list):
            if len(part["emas"]) != len(part["stds"]) or not all(map(_is_weights, part["emas"])):
                raise MalformedFile(f"has averages in {shown(key)} that do not fit their widths", FOREIGN)
            for std, weights in zip(part["stds"], part["emas"], strict=True):
                yield _Found(key, f"{key} {std}", weights)


def _is_weights(value: Any) -> bool:
    """Whether a value is a state dict: names and tensors, nothing else."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(array, np.ndarray) for name, array in value.items())


def _network(role: str, stored: StoredModule | dict[str, np.ndarray], budget: Budget) -> StoredNetwork:
    if isinstance(stored, StoredModule):
        return StoredNetwork(role, stored.class_name, config_of(stored), _weights(tensors_of(stored), budget))
    return StoredNetwork(role, "", {}, _weights(stored, budget))


def _weights(tensors: dict[str, np.ndarray], budget: Budget) -> dict[str, np.ndarray]:
    """The tensors, once it is clear that there are some, and that they do not repeat a few without end."""
    if not tensors:
        raise MalformedFile("has a network without weights", FOREIGN)
    budget.spend("bytes of networks", sum(array.nbytes for array in tensors.values()))
    return tensors


def _fact(value: Any) -> Any:
    """A plain value; of an optimizer, what it was set to, without its moments and its list of parameters."""
    if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
        groups = value["param_groups"] if isinstance(value["param_groups"], list) else []
        settings = [
            {key: part for key, part in group.items() if key != "params"} for group in groups if isinstance(group, dict)
        ]
        return {"param_groups": plain_value(settings)}
    return plain_value(value)
