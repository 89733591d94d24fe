"""Trackers, which show a run's scalars and pictures: TensorBoard always, Weights & Biases or Trackio on request."""

import os
import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uni_instruct.errors import RequestError
from uni_instruct.images import to_pil
from uni_instruct.system.files import atomic_file, disk_errors

PROJECT = "uni-instruct"
ID_FILE = "tracking_id"


class Tracker(Protocol):
    """A destination for curves and pictures. The x axis is `images`, the number of images that the stage has seen.

    A resumed run sends the values after its last saved state a second time; they coincide with the existing points.
    """

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        """Send one point of each curve."""
        ...

    def picture(self, name: str, sheet: np.ndarray, images: int) -> None:
        """Send one picture, uint8 [H, W, 1 or 3]."""
        ...

    def close(self) -> None:
        """Send what is still queued. Nothing may be sent afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker needs to know about a run: its folder, the name to show, and the recipe as plain values."""

    folder: Path
    name: str
    config: Mapping[str, object]


def check_trackers(names: Sequence[str]) -> None:
    """Raise RequestError for an unknown tracker, or if its package is not installed. Imports none of the packages."""
    for name in names:
        if name not in TRACKERS:
            raise RequestError(f"tracker '{name}' is unknown", remedy=f"choose one of {', '.join(TRACKERS)}", param="trackers")
        if not _is_installed(TRACKERS[name].package):
            raise RequestError(
                f"tracker '{name}' needs package '{TRACKERS[name].package}', which is not installed",
                remedy=TRACKERS[name].install,
                param="trackers",
            )


def open_trackers(names: Sequence[str], folder: Path, run_name: str, config: Mapping[str, object]) -> list[Tracker]:
    """Open TensorBoard and the named trackers, each once. Raises RequestError if one is unknown or cannot start.

    If one cannot start, those already opened are closed. A later call with the same folder continues the same runs. config:
    plain values, as in YAML.
    """
    # TensorBoard is always opened, because its files are local and need no account.
    wanted = list(dict.fromkeys(("tensorboard", *names)))
    check_trackers(wanted)
    run = TrackedRun(folder=folder, name=run_name, config=config)
    # If the second tracker cannot start, the first is closed, so that it does not show an empty run as running.
    with ExitStack() as opened:
        trackers = []
        for name in wanted:
            trackers.append(TRACKERS[name].open(run))
            opened.callback(trackers[-1].close)
        opened.pop_all()
    return trackers


def stable_id(folder: Path) -> str:
    """The id of a folder's run in the trackers: the folder's name and a random part. Created once and kept in the folder.

    The name alone is not enough: a new run in a folder of the same name would be drawn over the old run's curves, and Weights
    & Biases refuses the id of a deleted run.
    """
    file = folder / ID_FILE
    if not file.exists():
        readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.resolve().name)[:48]
        with atomic_file(file) as partial:
            partial.write_text(f"{readable}-{uuid.uuid4().hex[:8]}\n")
    return file.read_text().strip()


class TensorBoard:
    """Writes event files to the run's tensorboard/. Creates no file before the first value."""

    def __init__(self, run: TrackedRun):
        self._folder = run.folder / "tensorboard"
        self._events: Any = None

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        """Write one point of each curve, on disk when this returns."""
        with disk_errors(self._folder):
            for name, value in values.items():
                self._writer().add_scalar(name, value, images)
            self._writer().flush()  # a resumed run repeats no values from before its saved state, so they must be on disk

    def picture(self, name: str, sheet: np.ndarray, images: int) -> None:
        """Write one picture, on disk when this returns."""
        with disk_errors(self._folder):
            self._writer().add_image(name, sheet, images, dataformats="HWC")
            self._writer().flush()

    def close(self) -> None:
        """Close the event file."""
        if self._events is not None:
            with disk_errors(self._folder):
                self._events.close()

    def _writer(self) -> Any:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(self._folder))
        return self._events


class WeightsAndBiases:
    """A run in the project $WANDB_PROJECT, by default 'uni-instruct', with `stable_id`. Raises RequestError if W&B refuses."""

    def __init__(self, run: TrackedRun):
        self._wandb: Any = import_module("wandb")
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=stable_id(run.folder),
                name=run.name,
                dir=str(run.folder),
                config=dict(run.config),
                resume="allow",
                reinit="create_new",  # does not end a run that the calling program may have open
                settings=self._wandb.Settings(console="off"),  # do not capture the terminal, which shows progress bars
            )
        except self._wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise RequestError(
                f"tracker 'wandb' cannot start: {reason}",
                remedy="run 'wandb login', or set WANDB_MODE=offline",
                param="trackers",
            ) from error
        # W&B's own step must not decrease, but both stages count their images from zero. So "images" is the x axis.
        self._run.define_metric("images", hidden=True)
        self._run.define_metric("*", step_metric="images")

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        """Log one row of the run's history."""
        self._run.log({**values, "images": images})

    def picture(self, name: str, sheet: np.ndarray, images: int) -> None:
        """Log one row of the run's history with a PNG."""
        self._run.log({name: self._wandb.Image(to_pil(sheet)), "images": images})

    def close(self) -> None:
        """Wait until everything is sent. In W&B's offline mode, its files are complete only when the process has ended."""
        self._run.finish()


class Trackio:
    """A run in the project 'uni-instruct' of the local Trackio store, or of the Space or server that the environment names.

    Trackio resumes runs by name, so the name is `stable_id`.
    """

    def __init__(self, run: TrackedRun):
        self._trackio: Any = import_module("trackio")
        with redirect_stdout(sys.stderr):  # standard output is reserved for the command's result
            self._run = self._trackio.init(
                project=PROJECT,
                name=stable_id(run.folder),
                group=run.name,
                config=dict(run.config),
                resume="allow",
                embed=False,
            )

    def scalars(self, values: Mapping[str, float], images: int) -> None:
        """Log one row; its step is the number of images."""
        self._run.log(dict(values), step=images)

    def picture(self, name: str, sheet: np.ndarray, images: int) -> None:
        """Log one row with a PNG."""
        self._run.log({name: self._trackio.Image(to_pil(sheet))}, step=images)

    def close(self) -> None:
        """Wait until everything is written."""
        with redirect_stdout(sys.stderr):
            self._trackio.finish()


@dataclass(frozen=True, kw_only=True)
class TrackerKind:
    """One row of TRACKERS: the package that a tracker needs, the command that installs it, and the class that opens it."""

    package: str
    install: str
    open: Callable[[TrackedRun], Tracker]


TRACKERS = {
    "tensorboard": TrackerKind(package="tensorboard", install="pip install 'uni-instruct[train]'", open=TensorBoard),
    "wandb": TrackerKind(package="wandb", install="pip install wandb", open=WeightsAndBiases),
    "trackio": TrackerKind(package="trackio", install="pip install trackio", open=Trackio),
}


def _is_installed(package: str) -> bool:
    """Whether the package is installed. A mere folder of that name does not count."""
    # W&B leaves a folder wandb/ in the working directory, which Python would find as a namespace package.
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
