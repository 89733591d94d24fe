"""A classifier's file: its path, its metadata, and the hash of its weights. NumPy only."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from uni_instruct.errors import FileFormatError
from uni_instruct.spec import ImageShape
from uni_instruct.system.files import cache_folder

RECIPE = 1  # increased with every change to the network or its training; it is part of the cached file's name
FEATURES = 64
# The key of the file's metadata.
METADATA = "classifier"


@dataclass(frozen=True, kw_only=True)
class ClassifierInfo:
    """What a classifier was trained on, and its accuracy on held-out images (every tenth of the data)."""

    recipe: int
    image_shape: ImageShape
    num_classes: int
    heldout_accuracy: float
    fingerprint: str


def classifier_path(fingerprint: str) -> Path:
    """The path of the classifier for the data set with that fingerprint: the shipped file, or else a path in the cache.

    The file in the cache need not exist.
    """
    return shipped_classifier(fingerprint) or cached_classifier(fingerprint)


def shipped_classifier(fingerprint: str) -> Path | None:
    """The file of the classifier that ships for that data set; None if there is none."""
    folder = Path(str(files("uni_instruct") / "classifiers"))
    return next(folder.glob(f"*-{_file_name(fingerprint)}"), None)


def cached_classifier(fingerprint: str) -> Path:
    """The path of the classifier in the cache, whether or not it exists."""
    return cache_folder() / "classifiers" / _file_name(fingerprint)


def _file_name(fingerprint: str) -> str:
    return f"{fingerprint[:32]}-v{RECIPE}.safetensors"


def read_classifier(path: Path) -> tuple[dict[str, np.ndarray], ClassifierInfo]:
    """The weights by name, and the metadata. Raises FileFormatError if the file is corrupt or not a classifier's."""
    try:
        with safe_open(path, framework="np") as file:
            values = json.loads((file.metadata() or {})[METADATA])
            info = ClassifierInfo(**(values | {"image_shape": tuple(values["image_shape"])}))
            return {name: file.get_tensor(name) for name in file.keys()}, info  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise not_a_classifier(path, error) from error


def not_a_classifier(path: Path, error: Exception) -> FileFormatError:
    """The error for a file that cannot be read as a classifier."""
    return FileFormatError(f"{path} is not a classifier: {' '.join(str(error).split())[:200]}", remedy="remove that file")


def weights_sha256(weights: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of the names and values of all weights, in hexadecimal."""
    digest = hashlib.sha256()
    for name, values in sorted(weights.items()):
        digest.update(name.encode() + values.tobytes())
    return digest.hexdigest()
