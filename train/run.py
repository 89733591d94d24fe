"""A run on disk: recipe, log, samples, states and bundles, in a folder that a later call can resume."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning_fabric import Fabric

from uni_instruct.errors import FileFormatError
from uni_instruct.files import atomic_file, disk_errors
from uni_instruct.images import contact_sheet, encode
from uni_instruct.train.config import Recipe
from uni_instruct.train.monitoring.clock import Clock
from uni_instruct.train.monitoring.history import read_record
from uni_instruct.train.monitoring.trackers import Tracker, open_trackers
from uni_instruct.train.optimization.ema import Averages, PowerEma
from uni_instruct.train.optimization.posthoc import save_snapshot
from uni_instruct.train.recipe import parse_recipe, read_yaml
from uni_instruct.train.recipe_changes import Changes, allowed_changes, holds_training
from uni_instruct.train.run_lock import RunLock, refuse_foreign, taken

log = logging.getLogger(__name__)


class Run:
    """The folder of one run, written to by the first process alone.

    Raises RequestError where what it holds was trained by a recipe that does not go on as this one.
    """

    def __init__(self, folder: Path, recipe: Recipe, *, first_process: bool = True):
        self.folder = folder
        self.recipe = recipe
        self.clock = Clock(folder, first_process=first_process)
        self.snapshots = bool(recipe.teacher.ema_power_std or recipe.distillation.ema_power_std)
        self._first_process = first_process
        self._trackers: list[Tracker] | None = None
        file = folder / "recipe.yaml"
        refuse_foreign(folder)
        self._changes: Changes = {}
        if file.exists() and holds_training(folder):
            self._changes = allowed_changes(folder, parse_recipe(read_yaml(file)), recipe)
        elif first_process:
            self._write_recipe()

    def note_changes(self, stage: str, step: int) -> None:
        """Says, in the log and in recipe.yaml, what of the recipe is another from that step of a stage on; only once."""
        if not self._changes or not self._first_process:
            return
        self._write_line({"stage": stage, "step": step, "changed": self._changes})
        self._write_recipe()
        for key, (was, now) in self._changes.items():
            log.warning("%s, step %d: %s is %s from here on, it was %s", stage, step, key, now, was)
        self._changes = {}

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
        # The state before its note: a note that is older than its state is known to be of no use.
        with atomic_file(self._state_file(stage)) as partial, partial.open("wb") as file:
            torch.save(state, file)  # to a Python file, whose errors say that the disk is full
        with atomic_file(self._state_file(stage).with_suffix(".json")) as partial:
            partial.write_text(json.dumps({"step": state["step"]}))  # for those who ask without torch
        self.clock.write()

    def log(self, stage: str, step: int, kimg: float, values: Mapping[str, float]) -> None:
        """One line in log.jsonl, and the same values to the trackers over images seen."""
        self._write_line({"stage": stage, "step": step, "kimg": round(kimg, 3), **values})
        self.clock.write()
        # Two stages log to one tracker; a bare name would mix their curves.
        named = {name if "/" in name else f"{stage}/{name}": value for name, value in values.items()}
        for tracker in self._open_trackers():
            tracker.scalars(named, int(kimg * 1000))

    def warn(self, stage: str, step: int, warning: str) -> None:
        """A warning in words, on standard error and in log.jsonl."""
        self._write_line({"stage": stage, "step": step, "warning": warning})
        log.warning("%s, step %d: %s", stage, step, warning)

    def save_snapshots(self, stage: str, kimg: float, averages: Averages[torch.nn.Module]) -> None:
        """Today's power-function averages into snapshots/<stage>/, from which any other width can be reconstructed."""
        for average in averages:
            if isinstance(average, PowerEma):
                save_snapshot(self.folder / "snapshots" / stage, kimg, average.std, average.module.state_dict())

    def close(self) -> None:
        """Ends what trackers have open."""
        for tracker in self._trackers or ():
            tracker.close()

    def forget_log_after(self, stage: str, step: int) -> None:
        """Drops the lines that a resumed run is going to write again."""
        file = self.folder / "log.jsonl"
        if not file.exists():
            return
        lines = file.read_bytes().splitlines()  # of a damaged one, no text
        kept = [line for line in lines if _line_precedes(line, stage, step)]
        # Most resumed runs have nothing to forget, and logs are long.
        if kept == lines:
            return
        with atomic_file(file) as partial:
            partial.write_bytes(b"".join(line + b"\n" for line in kept))

    def save_samples(self, stage: str, kimg: float, images: np.ndarray) -> None:
        """A grid of images, uint8 [N, H, W, C], as samples/<stage>-<kimg>.png and to the trackers."""
        sheet = contact_sheet(images)
        with atomic_file(self.folder / "samples" / f"{stage}-{kimg:08.1f}.png") as partial:
            partial.write_bytes(encode(sheet))
        for tracker in self._open_trackers():
            tracker.picture(f"{stage}/samples", sheet, int(kimg * 1000))

    def _state_file(self, stage: str) -> Path:
        return self.folder / "state" / f"{stage}.pt"

    def _write_recipe(self) -> None:
        with atomic_file(self.folder / "recipe.yaml") as partial:
            partial.write_text(yaml.safe_dump(self.recipe.to_dict(), sort_keys=False))

    def _write_line(self, record: Mapping[str, object]) -> None:
        with disk_errors(self.folder), (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _open_trackers(self) -> list[Tracker]:
        if self._trackers is None:
            self._trackers = open_trackers(self.recipe.loop.trackers, self.folder, self.recipe.name, self.recipe.to_dict())
        return self._trackers


@contextmanager
def claimed(folder: Path, fabric: Fabric) -> Iterator[RunLock]:
    """Holds the folder for the processes of fabric. Raises RequestError, in each of them, where others train there."""
    with RunLock(folder) as lock:
        # One process asks; the others must hear the answer, or they would wait for it in vain.
        free = lock.acquire() if fabric.is_global_zero else True
        if not fabric.broadcast(free):
            raise taken(folder)
        yield lock


def _line_precedes(line: bytes, stage: str, step: int) -> bool:
    record = read_record(line)
    if record is None:
        return False  # a line that a killed run left half written
    at = record.get("step")
    return record.get("stage") != stage or not isinstance(at, int) or at <= step
