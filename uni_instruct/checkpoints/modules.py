"""Read pickled modules as weights by state-dict name, and as the configuration that they were made with."""

from collections.abc import Iterator
from typing import Any, TypeGuard

import numpy as np

from uni_instruct.checkpoints.budget import UNSUPPORTED, MalformedFile, shown
from uni_instruct.checkpoints.pickle.unpickle import SMALL, StoredModule

# The attribute of a preconditioning that is the network inside it: `model` in EDM, SiD and SiDA, `unet` in EDM2.
_INNER = ("model", "unet")
# A preconditioning derives these from img_channels, so they are not settings of their own.
_DERIVED = frozenset({"in_channels", "out_channels"})
# The mode that a module was saved in, which is not part of its configuration.
_MODES = frozenset({"training"})
_MAX_NAME_LENGTH = 500


def is_network(value: object) -> TypeGuard[StoredModule]:
    """Whether a value is a module, not another object that was pickled with its class."""
    return isinstance(value, StoredModule) and "_modules" in value.state and "_parameters" in value.state


def tensors_of(module: StoredModule) -> dict[str, np.ndarray]:
    """Parameters and persistent buffers by state-dict name, in the order of torch's state_dict. Raises MalformedFile."""
    tensors: dict[str, np.ndarray] = {}
    for name, array in _walk(module, ""):
        if name in tensors or len(name) > _MAX_NAME_LENGTH:
            raise MalformedFile(f"has two tensors {shown(name)}, or a name that is too long", UNSUPPORTED)
        tensors[name] = array
    return tensors


def config_of(module: StoredModule) -> dict[str, Any]:
    """A network's configuration: its arguments, those of the network inside it, and its plain attributes.

    An attribute replaces an argument of the same name, because it is what the network used. `model_type` is the class of the
    network inside.
    Raises MalformedFile if the arguments of the two contradict each other.
    """
    inner = _inner(module)
    arguments = _arguments(module)
    if inner is not None:
        within = {**_arguments(inner), "model_type": inner.class_name}
        for name in sorted(within.keys() & arguments.keys()):
            if within[name] != arguments[name]:
                raise MalformedFile(
                    f"has a module {module.class_name} that contradicts its {inner.class_name} about {shown(name)}"
                )
        arguments |= {name: value for name, value in within.items() if name not in _DERIVED}
    return arguments | attributes_of(module)


def attributes_of(module: StoredModule) -> dict[str, Any]:
    """The plain attributes: numbers, strings, and containers of them. Small arrays become lists; others are left out."""
    public = {name: value for name, value in module.state.items() if not name.startswith("_") and name not in _MODES}
    return {name: plain for name, value in public.items() if (plain := plain_value(value)) is not None or value is None}


def plain_value(value: object) -> Any:
    """The value with small arrays as lists and modules as their attributes; None if it has no plain form."""
    if isinstance(value, np.ndarray):
        return value.tolist() if value.size <= SMALL else None
    if isinstance(value, StoredModule):
        return {"class_name": value.class_name, **attributes_of(value)}
    if isinstance(value, dict):
        return {key: plain_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(part) for part in value]
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else value


def _walk(module: StoredModule, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    left_out = module.state.get("_non_persistent_buffers_set", set())
    if not isinstance(left_out, set | frozenset):
        raise MalformedFile(f"has a module {module.class_name} whose list of buffers is broken", UNSUPPORTED)
    # The names of these attributes, and their order, are those of torch.nn.Module.
    for part, skipped in (("_parameters", frozenset()), ("_buffers", left_out)):
        for name, array in _children(module, part).items():
            if array is None or name in skipped:
                continue
            if not isinstance(array, np.ndarray):
                raise MalformedFile(f"has a module {module.class_name} whose {shown(name)} is not a tensor", UNSUPPORTED)
            yield prefix + name, array
    for name, child in _children(module, "_modules").items():
        if child is None:
            continue
        if not is_network(child):
            raise MalformedFile(f"has a module {module.class_name} whose {shown(name)} is not a module", UNSUPPORTED)
        yield from _walk(child, f"{prefix}{name}.")


def _children(module: StoredModule, part: str) -> dict[str, Any]:
    """A module's parameters, buffers or modules by name. part: '_parameters', '_buffers' or '_modules'."""
    children = module.state.get(part)
    if not isinstance(children, dict):
        raise MalformedFile(f"has a module {module.class_name} whose {part} is not a dict", UNSUPPORTED)
    for name in children:
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME_LENGTH or "." in name:
            raise MalformedFile(f"has a module {module.class_name} with the name {shown(name)} in its {part}", UNSUPPORTED)
    return children


def _inner(module: StoredModule) -> StoredModule | None:
    children = _children(module, "_modules")
    found = [child for name in _INNER if (child := children.get(name)) is not None]
    return found[0] if found and isinstance(found[0], StoredModule) else None


def _arguments(module: StoredModule) -> dict[str, Any]:
    """The arguments that a module was made with, by name."""
    arguments = module.state.get("_init_kwargs") or {}
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise MalformedFile(f"has a module {module.class_name} with broken arguments", UNSUPPORTED)
    return {name: plain_value(value) for name, value in arguments.items()}
