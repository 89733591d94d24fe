"""Prefixes that wrappers add to the names of a network's weights, and counters that they store beside them."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

# Prefixes of wrappers: DistributedDataParallel, torch.compile, Lightning's and FastGen's modules.
WRAPPERS = frozenset({"module", "_orig_mod", "net", "model", "_forward_module", "_fsdp_wrapped_module"})
# The name of the network inside EDM's and EDM2's preconditioning. In this package it is `model`.
_INNER = ("model", "unet")
# A layer that every network known here has, in any configuration.
_FIRST = re.compile(r"((?:.*\.)?)enc\.([0-9]+)x\2_conv\.weight")
_COUNTERS = frozenset(
    {"num_batches_tracked", "n_averaged", "num_updates", "step", "steps", "global_step", "iteration", "epoch", "cur_nimg"}
    | {"initted", "decay"}
)


def is_counter(name: str) -> bool:
    """Whether a name is that of a number that wrappers and averages store beside weights."""
    return name.rpartition(".")[2] in _COUNTERS


def network_prefixes(names: Iterable[str]) -> list[str]:
    """The prefix of each network in a state dict, in order, without the network's own 'model.' or 'unet.'."""
    found = (match[1] for name in names if (match := _FIRST.fullmatch(name)))
    return list(dict.fromkeys(prefix.removesuffix(inner) for prefix in found for inner in [_inner_of(prefix)]))


def split_weights(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A network's tensors by their names without prefixes; and the tensors beside it: its preconditioning's, and counters.

    Prefixes of wrappers are removed in any order and depth until the names are a network's. If they never are, the prefixes
    that all names share are removed.
    """
    prefix = next((match[1] for name in tensors if (match := _FIRST.fullmatch(name))), None)
    if prefix is None:
        return _without_wrappers(tensors), {}
    outer = prefix.removesuffix(_inner_of(prefix))
    bare = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    beside = {_without_prefixes(outer, name): array for name, array in tensors.items() if not name.startswith(prefix)}
    counters = {name: bare.pop(name) for name in list(bare) if is_counter(name)}
    return bare, beside | counters


def _inner_of(prefix: str) -> str:
    """'model.' or 'unet.' if it is the prefix's last part, else ''."""
    last = prefix.rstrip(".").rpartition(".")[2]
    return f"{last}." if last in _INNER else ""


def _without_prefixes(outer: str, name: str) -> str:
    """The name of a tensor beside the network, without as many of the wrappers' prefixes as it has."""
    for part in filter(None, outer.split(".")):
        name = name.removeprefix(f"{part}.")
    return name


def _without_wrappers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    stripped = dict(tensors)
    while stripped:
        firsts = {name.partition(".")[0] for name in stripped if "." in name}
        if len(firsts) != 1 or not firsts <= WRAPPERS or not all("." in name for name in stripped):
            break
        stripped = {name.partition(".")[2]: array for name, array in stripped.items()}
    return stripped
