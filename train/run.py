"""A run on disk: recipe, log, samples, states and bundles, in a folder that a later call can resume."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.files import atomic_file, disk_errors
from uni_instruct.images import contact_sheet, encode
from uni_instruct.train.config import Recipe, parse_recipe, read_yaml


class Run:
    """The folder of one run. Raises RequestError where it holds a run of another recipe."""

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder = folder
        self.recipe = recipe
        self._events: Any = None
        file = folder / "recipe.yaml"
        if file.exists():
            _check_same_recipe(folder, parse_recipe(read_yaml(file)), recipe)
        else:
            with atomic_file(file) as partial:
                partial.write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))

    def load_state(self, stage: str) -> dict[str, Any] | None:
        """What `save_state` wrote last for a stage, None before the first. Raises FileFormatError for a corrupt file."""
        file = self._state_file(stage)
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises whatever its zip and pickle readers do
            raise FileFormatError(f"state {file} cannot be read", remedy="delete it to train that stage anew") from error
        return state

    def save_state(self, stage: str, state: dict[str, Any]) -> None:
        """Replaces the stage's state; the old one stays where writing fails."""
        with atomic_file(self._state_file(stage)) as partial, partial.open("wb") as file:
            torch.save(state, file)  # to a Python file, whose errors say that the disk is full

    def log(self, stage: str, step: int, kimg: float, values: Mapping[str, float]) -> None:
        """One line in log.jsonl, and the same values as TensorBoard scalars over images seen."""
        line = json.dumps({"stage": stage, "step": step, "kimg": round(kimg, 3), **values})
        with disk_errors(self.folder), (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        for name, value in values.items():
            self._writer().add_scalar(name if "/" in name else f"{stage}/{name}", value, int(kimg * 1000))

    def forget_log_after(self, stage: str, step: int) -> None:
        """Drops the lines that a resumed run is going to write again."""
        file = self.folder / "log.jsonl"
        if not file.exists():
            return
        lines = file.read_text().splitlines()
        kept = [line for line in lines if _line_precedes(line, stage, step)]
        if kept == lines:
            return
        with atomic_file(file) as partial:
            partial.write_text("".join(line + "\n" for line in kept))

    def save_samples(self, stage: str, kimg: float, images: np.ndarray) -> None:
        """A grid of images, uint8 [N, H, W, C], as samples/<stage>-<kimg>.png and in TensorBoard."""
        sheet = contact_sheet(images)
        with atomic_file(self.folder / "samples" / f"{stage}-{kimg:08.1f}.png") as partial:
            partial.write_bytes(encode(sheet))
        self._writer().add_image(f"{stage}/samples", sheet, int(kimg * 1000), dataformats="HWC")

    def _state_file(self, stage: str) -> Path:
        return self.folder / "state" / f"{stage}.pt"

    def _writer(self) -> Any:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self.folder / "tensorboard"))
        return self._events


def _check_same_recipe(folder: Path, old: Recipe, new: Recipe) -> None:
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    for key in before:
        if before[key] != after[key] and key != "measured":
            raise RequestError(
                f"{folder} holds a run with {key}={before[key]}, not {after[key]}",
                remedy="choose another --out, or the same recipe to resume",
                param="out",
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _line_precedes(line: str, stage: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False  # a line that a killed run left half written
    return bool(record["stage"] != stage or record["step"] <= step)
