"""A classifier's file: where it is kept, what it was trained for, and its weights' hash. NumPy only."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from uni_instruct.errors import FileFormatError
from uni_instruct.files import cache_folder
from uni_instruct.spec import ImageShape

RECIPE = 1  # counts up with every change to the network or its training, and is part of the cached file's name
FEATURES = 64
# The key of the file's metadata.
METADATA = "classifier"


@dataclass(frozen=True, kw_only=True)
class ClassifierInfo:
    """What a classifier was trained for and how well it does on images it has not seen (every tenth)."""

    recipe: int
    image_shape: ImageShape
    num_classes: int
    heldout_accuracy: float
    fingerprint: str


def classifier_path(fingerprint: str) -> Path:
    """Where the classifier of the data set with that fingerprint ships, or where the cache has, or would have, it."""
    return shipped_classifier(fingerprint) or cached_classifier(fingerprint)


def shipped_classifier(fingerprint: str) -> Path | None:
    """The file that ships, None where none does."""
    folder = Path(str(files("uni_instruct") / "classifiers"))
    return next(folder.glob(f"*-{_file_name(fingerprint)}"), None)


def cached_classifier(fingerprint: str) -> Path:
    """Where the cache has, or would have, it."""
    return cache_folder() / "classifiers" / _file_name(fingerprint)


def _file_name(fingerprint: str) -> str:
    return f"{fingerprint[:32]}-v{RECIPE}.safetensors"


def read_classifier(path: Path) -> tuple[dict[str, np.ndarray], ClassifierInfo]:
    """Its weights by name. Raises FileFormatError for a file that is no classifier's or corrupt."""
    try:
        with safe_open(path, framework="np") as file:
            values = json.loads((file.metadata() or {})[METADATA])
            info = ClassifierInfo(**(values | {"image_shape": tuple(values["image_shape"])}))
            return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise not_a_classifier(path, error) from error


def not_a_classifier(path: Path, error: Exception) -> FileFormatError:
    """The error, as the user is told it."""
    return FileFormatError(f"{path} is not a classifier: {' '.join(str(error).split())[:200]}", remedy="remove that file")


def weights_sha256(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names and values of all weights, in hex."""
    digest = hashlib.sha256()
    for name, values in sorted(weights.items()):
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()
