"""Import torch-fidelity, even if torchvision's compiled operators cannot be loaded."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from uni_instruct.errors import MissingExtraError

if TYPE_CHECKING:
    import torch

# torchvision registers shape functions for these operators when it is imported, even if its compiled library is not loaded.
_TORCHVISION_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def fidelity(module: str = "") -> ModuleType:
    """Import torch-fidelity or one of its modules, such as 'metric_fid'. Raises MissingExtraError if it is not installed."""
    try:
        _import_torchvision()
        return importlib.import_module(f"torch_fidelity.{module}" if module else "torch_fidelity")
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch-fidelity", extra="evaluate") from error


def create_extractor(registered: str, layers: list[str], weights: Path) -> "torch.nn.Module":
    """One of torch-fidelity's registered extractors, which returns those layers, with weights from a file."""
    module: torch.nn.Module = fidelity("utils").create_feature_extractor(
        registered, layers, cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
    )
    return module


def _import_torchvision() -> None:
    """Import torchvision, which torch-fidelity imports although nothing that is used here needs it.

    A torchvision that was built for another torch (one for CUDA beside a torch for the CPU) cannot load its operators. Its
    import then fails because they are undefined. It is enough to declare their schemas: nothing here calls them, and a call
    would raise an error.
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
