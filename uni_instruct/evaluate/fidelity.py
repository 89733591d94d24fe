"""torch-fidelity, imported where torchvision's compiled operators cannot be loaded too."""

import importlib
from types import ModuleType

from uni_instruct.errors import MissingExtraError

# Operators that torchvision registers shape functions for when it is imported, whether or not its library was loaded.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def fidelity(module: str = "") -> ModuleType:
    """torch-fidelity or one of its modules, such as 'metric_fid'. Raises MissingExtraError where it is not installed."""
    try:
        _import_torchvision()
        return importlib.import_module(f"torch_fidelity.{module}" if module else "torch_fidelity")
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch-fidelity", extra="evaluate") from error


def _import_torchvision() -> None:
    """Imports torchvision, which torch-fidelity needs for nothing that is used here but imports at once.

    A torchvision built for another kind of torch (for CUDA, beside a CPU torch) fails to load its operators, and then its
    import fails as they are unknown. Declaring their schemas is enough: nobody calls them, and who does gets a clear error.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for schema in _TORCHVISION_SCHEMAS:
            name, _, signature = schema.partition("(")
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", f"({signature}")
        importlib.import_module("torchvision")
