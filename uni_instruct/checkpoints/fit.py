"""Check that a file has exactly the weights of a module: none missing, none left over, each of its shape and finite."""

from collections.abc import Mapping

import numpy as np

from uni_instruct.errors import FileFormatError

# A file that holds more than one network stays the same, however often it is downloaded.
SAVE_ALONE = "save the state_dict of that network alone"
Shapes = Mapping[str, tuple[int, ...]]


def check_fit(what: str, expected: Shapes, weights: Mapping[str, np.ndarray]) -> None:
    """Compare weights with the expected shapes. what: the module's name for messages.

    Raises FileFormatError, which names the first weights that do not match.
    """
    held = {name: array.shape for name, array in weights.items()}
    if missing := sorted(expected.keys() - held.keys()):
        raise weight_mismatch(what, "lacks weights", missing)
    if unexpected := sorted(held.keys() - expected.keys()):
        raise weight_mismatch(what, "holds weights that are not its own", unexpected, SAVE_ALONE)
    if wrong := [f"{name} {held[name]} instead of {expected[name]}" for name in expected if held[name] != expected[name]]:
        raise weight_mismatch(what, "has weights of another shape", wrong)


def finite(name: str, array: np.ndarray) -> np.ndarray:
    """The weight, unchanged. Raises FileFormatError unless it holds finite floats."""
    if not np.issubdtype(array.dtype, np.floating):
        raise FileFormatError(f"weight {name} is of type {array.dtype}, not a float", remedy="save the weights as floats")
    if not np.isfinite(array).all():
        raise FileFormatError(f"weight {name} holds values that are not finite", remedy="import an earlier state")
    return array


def weight_mismatch(what: str, problem: str, names: list[str], remedy: str = "download it again") -> FileFormatError:
    """The error for weights that do not match. It names the first three."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return FileFormatError(f"the {what} {problem}: {', '.join(names[:3])}{more}", remedy=remedy)
