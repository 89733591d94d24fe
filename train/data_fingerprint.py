"""Checks that a resumed run gets the data that it was started with."""

import json
from pathlib import Path
from typing import TypedDict

from uni_instruct.data import Dataset
from uni_instruct.errors import RequestError
from uni_instruct.system.files import JSON_ERRORS, atomic_file
from uni_instruct.train.recipe_changes import DATA_DESCRIPTION, holds_training


class DataDescription(TypedDict):
    """The description of a run's data that is stored in its folder."""

    images: int
    image_shape: list[int]
    class_names: list[str]
    fingerprint: str


def check_same_data(folder: Path, dataset: Dataset, *, write: bool) -> None:
    """Store a description of the data when a run starts. When it is resumed, raise RequestError if the data has changed.

    write: whether this process may write. A run of an earlier version, without a description, accepts the data as it is. If
    nothing has been trained yet, an existing description is from a failed start and is replaced.
    """
    facts: DataDescription = {
        "images": len(dataset),
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
        "fingerprint": dataset.sample_fingerprint(),
    }
    noted = _noted(folder / DATA_DESCRIPTION) if holds_training(folder) else None
    if noted is None:
        if write:
            with atomic_file(folder / DATA_DESCRIPTION) as partial:
                partial.write_text(json.dumps(facts))
        return
    if noted != facts:
        raise RequestError(
            f"data set '{dataset.source}' {_difference(noted, facts)} since the run in {folder} was started",
            remedy="restore the data that the run was started with, or choose another --out",
            param="data",
        )


def saved_classes(folder: Path) -> tuple[str, ...]:
    """The class names that a run has been trained with, in its order; empty if nothing was trained, or without classes."""
    noted = _noted(folder / DATA_DESCRIPTION) if holds_training(folder) else None
    names = noted.get("class_names") if noted else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _noted(file: Path) -> DataDescription | None:
    try:
        noted: DataDescription = json.loads(file.read_text())
    except (OSError, *JSON_ERRORS):
        return None
    return noted if isinstance(noted, dict) and isinstance(noted.get("class_names", []), list) else None


def _difference(before: DataDescription, now: DataDescription) -> str:
    names, others = before.get("class_names") or [], now["class_names"]
    if names != others:
        come, gone = sorted(set(others) - set(names)), sorted(set(names) - set(others))
        words = [f"{word} {', '.join(part[:3])}" for word, part in (("got", come), ("lost", gone)) if part]
        return f"has other classes ({' and '.join(words) or 'in another order'})"
    if before.get("images") != now["images"]:
        return f"has changed from {before.get('images')} images to {now['images']}"
    if before.get("image_shape") != now["image_shape"]:
        return f"has changed from {before.get('image_shape')} channels, height and width to {now['image_shape']}"
    return "has other images or labels"
