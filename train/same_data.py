"""Whether the data of a run are still those that it was begun with."""

import json
from pathlib import Path
from typing import TypedDict

from uni_instruct.data import Dataset
from uni_instruct.errors import RequestError
from uni_instruct.files import JSON_ERRORS, atomic_file
from uni_instruct.train.recipe_changes import DATA_NOTE, holds_training


class DataNote(TypedDict):
    """What the data of a run are, as its folder notes it."""

    images: int
    image_shape: list[int]
    class_names: list[str]
    fingerprint: str


def check_same_data(folder: Path, dataset: Dataset, *, write: bool) -> None:
    """Notes the data in the run's folder at its beginning; later raises RequestError, in one line, where they are others.

    write: whether this process is the one that writes. A run that was begun before there was a note takes the data as they are,
    and where nothing has been trained, a note is that of a start that came to nothing.
    """
    facts: DataNote = {
        "images": len(dataset),
        "image_shape": list(dataset.image_shape),
        "class_names": list(dataset.class_names),
        "fingerprint": dataset.sample_fingerprint(),
    }
    noted = _noted(folder / DATA_NOTE) if holds_training(folder) else None
    if noted is None:
        if write:
            with atomic_file(folder / DATA_NOTE) as partial:
                partial.write_text(json.dumps(facts))
        return
    if noted != facts:
        raise RequestError(
            f"data set '{dataset.source}' {_difference(noted, facts)} since the run in {folder} was begun",
            remedy="give the data as they were, or choose another --out",
            param="data",
        )


def saved_classes(folder: Path) -> tuple[str, ...]:
    """The classes that a run has been trained with, in its order; none where nothing was trained, or without classes."""
    noted = _noted(folder / DATA_NOTE) if holds_training(folder) else None
    names = noted.get("class_names") if noted else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _noted(file: Path) -> DataNote | None:
    try:
        noted: DataNote = json.loads(file.read_text())
    except (OSError, *JSON_ERRORS):
        return None
    return noted if isinstance(noted, dict) and isinstance(noted.get("class_names", []), list) else None


def _difference(before: DataNote, now: DataNote) -> str:
    names, others = before.get("class_names") or [], now["class_names"]
    if names != others:
        come, gone = sorted(set(others) - set(names)), sorted(set(names) - set(others))
        words = [f"{word} {', '.join(part[:3])}" for word, part in (("got", come), ("lost", gone)) if part]
        return f"has other classes ({' and '.join(words) or 'in another order'})"
    if before.get("images") != now["images"]:
        return f"has changed from {before.get('images')} images to {now['images']}"
    if before.get("image_shape") != now["image_shape"]:
        return f"has changed from {before.get('image_shape')} channels, height and width to {now['image_shape']}"
    return "has got other images or labels"
