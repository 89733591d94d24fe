"""A run's folder: recipe, log, samples, saved states and snapshots, from which a later call can resume."""

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
from uni_instruct.images import contact_sheet, encode
from uni_instruct.system.files import atomic_file, disk_errors
from uni_instruct.train.config import Recipe
from uni_instruct.train.monitoring.clock import Clock
from uni_instruct.train.monitoring.history import read_record
from uni_instruct.train.monitoring.trackers import Tracker, open_trackers
from uni_instruct.train.optimization.ema import Averages, PowerEma
from uni_instruct.train.optimization.posthoc import save_snapshot
from uni_instruct.train.recipe import parse_recipe, read_yaml
from uni_instruct.train.recipe_changes import Changes, allowed_changes, holds_training
from uni_instruct.train.run_lock import RunLock, in_use_error, refuse_foreign

log = logging.getLogger(__name__)


class Run:
    """The folder of one run. Only the first process writes to it.

    Raises RequestError if the folder holds a run whose recipe differs from this one in a way that does not allow resuming.
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
        """Record changes of the recipe, which apply from that step of a stage on, in the log and in recipe.yaml. Only once."""
        if not self._changes or not self._first_process:
            return
        self._write_line({"stage": stage, "step": step, "changed": self._changes})
        self._write_recipe()
        for key, (was, now) in self._changes.items():
            log.warning("%s, step %d: from here on %s is %s (before: %s)", stage, step, key, now, was)
        self._changes = {}

    def load_state(self, stage: str) -> dict[str, Any] | None:
        """The stage's last saved state; None if there is none. Raises FileFormatError for a corrupt file."""
        file = self._state_file(stage)
        if not file.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch passes on any error of its zip and pickle readers
            raise FileFormatError(
                f"state {file} cannot be read", remedy="delete it to train that stage again from the start"
            ) from error
        return state

    def save_state(self, stage: str, state: dict[str, Any]) -> None:
        """Replace the stage's saved state. If writing fails, the old one stays."""
        # The state first, then the JSON file with its step: `train --status` ignores a JSON file that is older than the state.
        with atomic_file(self._state_file(stage)) as partial, partial.open("wb") as file:
            torch.save(state, file)  # to a Python file, because Python's error says that the disk is full
        with atomic_file(self._state_file(stage).with_suffix(".json")) as partial:
            partial.write_text(json.dumps({"step": state["step"]}))  # for readers without torch, such as `train --status`
        self.clock.write()

    def log(self, stage: str, step: int, kimg: float, values: Mapping[str, float]) -> None:
        """Write one line to log.jsonl, and send the values to the trackers, whose x axis is images seen."""
        self._write_line({"stage": stage, "step": step, "kimg": round(kimg, 3), **values})
        self.clock.write()
        # Both stages log to the same trackers. The stage as prefix keeps curves of the same name apart.
        named = {name if "/" in name else f"{stage}/{name}": value for name, value in values.items()}
        for tracker in self._open_trackers():
            tracker.scalars(named, int(kimg * 1000))

    def warn(self, stage: str, step: int, warning: str) -> None:
        """Write a warning to the log (standard error) and to log.jsonl."""
        self._write_line({"stage": stage, "step": step, "warning": warning})
        log.warning("%s, step %d: %s", stage, step, warning)

    def save_snapshots(self, stage: str, kimg: float, averages: Averages[torch.nn.Module]) -> None:
        """Write the current power-function averages to snapshots/<stage>/, from which other widths can be reconstructed."""
        for average in averages:
            if isinstance(average, PowerEma):
                save_snapshot(self.folder / "snapshots" / stage, kimg, average.std, average.module.state_dict())

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self._trackers or ():
            tracker.close()

    def remove_log_after(self, stage: str, step: int) -> None:
        """Remove the stage's lines after that step from log.jsonl, because a resumed run will write them again."""
        file = self.folder / "log.jsonl"
        if not file.exists():
            return
        lines = file.read_bytes().splitlines()  # of a damaged one, no text
        kept = [line for line in lines if _line_precedes(line, stage, step)]
        # Most resumed runs have nothing to remove, and rewriting a long log takes time.
        if kept == lines:
            return
        with atomic_file(file) as partial:
            partial.write_bytes(b"".join(line + b"\n" for line in kept))

    def save_samples(self, stage: str, kimg: float, images: np.ndarray) -> None:
        """Write a grid of images, uint8 [N, H, W, C], to samples/<stage>-<kimg>.png, and send it to the trackers."""
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
def lock_run_folder(folder: Path, fabric: Fabric) -> Iterator[RunLock]:
    """Lock the folder for the processes of fabric. Raises RequestError, in each process, if another run has the lock."""
    with RunLock(folder) as lock:
        # Rank 0 takes the lock and broadcasts the result, so that all ranks stop if it failed.
        free = lock.acquire() if fabric.is_global_zero else True
        if not fabric.broadcast(free):
            raise in_use_error(folder)
        yield lock


def _line_precedes(line: bytes, stage: str, step: int) -> bool:
    record = read_record(line)
    if record is None:
        return False  # an incomplete line of a killed run
    at = record.get("step")
    return record.get("stage") != stage or not isinstance(at, int) or at <= step
