"""What stands before the names of a network's weights, and what stands among them: wrappers, and their counters."""

import re
from collections.abc import Iterable, Mapping

import numpy as np

# What wrappers put before names: DistributedDataParallel, torch.compile, Lightning's and FastGen's modules.
WRAPPERS = frozenset({"module", "_orig_mod", "net", "model", "_forward_module", "_fsdp_wrapped_module"})
# Where EDM and EDM2 keep the network inside its preconditioning; here it is `model`.
_INNER = ("model", "unet")
# A layer that every network known here has, whatever its configuration.
_FIRST = re.compile(r"((?:.*\.)?)enc\.([0-9]+)x\2_conv\.weight")
_COUNTERS = frozenset(
    {"num_batches_tracked", "n_averaged", "num_updates", "step", "steps", "global_step", "iteration", "epoch", "cur_nimg"}
    | {"initted", "decay"}
)


def is_counter(name: str) -> bool:
    """Whether a name is that of a number which wrappers and averages keep beside weights."""
    return name.rpartition(".")[2] in _COUNTERS


def network_prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the names of each network in a state dict, without the network's own 'model.' or 'unet.', in order."""
    found = (match[1] for name in names if (match := _FIRST.fullmatch(name)))
    return list(dict.fromkeys(prefix.removesuffix(inner) for prefix in found for inner in [_inner_of(prefix)]))


def split_weights(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A network's own tensors by their bare names, and those beside it: its preconditioning's, and counters.

    Wrappers' prefixes are peeled in any order and depth until the names are a network's; where they never are, those that all
    names share.
    """
    prefix = next((match[1] for name in tensors if (match := _FIRST.fullmatch(name))), None)
    if prefix is None:
        return _peeled(tensors), {}
    outer = prefix.removesuffix(_inner_of(prefix))
    bare = {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}
    beside = {_without(outer, name): array for name, array in tensors.items() if not name.startswith(prefix)}
    counters = {name: bare.pop(name) for name in list(bare) if is_counter(name)}
    return bare, beside | counters


def _inner_of(prefix: str) -> str:
    """'model.' or 'unet.' where that is the prefix's last part, else ''."""
    last = prefix.rstrip(".").rpartition(".")[2]
    return f"{last}." if last in _INNER else ""


def _without(outer: str, name: str) -> str:
    """A name beside the network without the wrappers before it, as many of them as it has."""
    for part in filter(None, outer.split(".")):
        name = name.removeprefix(f"{part}.")
    return name


def _peeled(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    stripped = dict(tensors)
    while stripped:
        firsts = {name.partition(".")[0] for name in stripped if "." in name}
        if len(firsts) != 1 or not firsts <= WRAPPERS or not all("." in name for name in stripped):
            break
        stripped = {name.partition(".")[2]: array for name, array in stripped.items()}
    return stripped
