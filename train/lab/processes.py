"""Runs a lab's trainings as `uni-instruct train` processes, several at once, on this machine or with Ray, with one bar."""

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

import yaml

from uni_instruct.errors import UniInstructError
from uni_instruct.system.files import atomic_file
from uni_instruct.system.processes import die_with_parent
from uni_instruct.system.progress import Progress, progress
from uni_instruct.train.config import Recipe
from uni_instruct.train.lab.experiments import Lab
from uni_instruct.train.monitoring.status import read_status
from uni_instruct.train.run_lock import program

POLL_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Training:
    """One call of `uni-instruct train`. What it prints is written to `output`. words: further options."""

    folder: Path
    recipe: Recipe
    words: tuple[str, ...] = ()

    @property
    def output(self) -> Path:
        """The file of the training's output. It is beside the run's folder, because only the run writes into that."""
        return self.folder.with_suffix(self.folder.suffix + ".txt")

    @property
    def steps_done(self) -> int:
        """Steps done so far, of both stages together, according to the log."""
        with suppress(UniInstructError):  # a run that has not started has no status
            return sum(stage.step for stage in read_status(self.folder).stages)
        return 0


class StartedTraining(Protocol):
    """A training that was started: a `subprocess.Popen`, or an object with the same methods for a training elsewhere."""

    @property
    def returncode(self) -> int | None:
        """The exit code of the last `poll` or `wait`; None while the training runs."""
        ...

    def poll(self) -> int | None:
        """Check whether the training has ended. Returns its exit code, None while it runs."""
        ...

    def terminate(self) -> None:
        """Ask the training to save its state and end."""
        ...

    def wait(self) -> int:
        """Wait until the training has ended. Returns its exit code."""
        ...


# A function (training, number of trainings at once) -> started training.
Start = Callable[[Training, int], StartedTraining]


def start_training(training: Training, jobs: int) -> "subprocess.Popen[bytes]":
    """Start `train` as a child process on this machine. If this process ends, the child saves its state and ends too.

    jobs: number of trainings at once, which share the cores.
    """
    training.folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = training.folder.with_suffix(training.folder.suffix + ".yaml")
    with atomic_file(recipe) as partial:
        partial.write_text(yaml.safe_dump(training.recipe.to_dict(), sort_keys=False))
    # Each training gets its share of the cores, because more threads than cores wait for each other.
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ} if jobs > 1 else dict(os.environ)
    command = [*program(), "train", str(recipe), "--out", str(training.folder), *training.words]
    with training.output.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, preexec_fn=die_with_parent(os.getpid())
        )


def train_all(lab: Lab, jobs: int, nice: int, start: Start = start_training) -> dict[Path, str]:
    """Train the teacher, then all experiments, `jobs` at once. Continues where an earlier call stopped.

    Returns folder -> last line of output, for experiments that failed. Raises UniInstructError if the teacher's training fails.
    """
    words = ("--nice", str(nice)) if nice else ()
    if lab.teacher is not None:
        teacher = Training(folder=lab.teacher_run, recipe=lab.teacher, words=("--teacher-only", *words))
        if failed := _run([teacher], 1, "teacher", lab.teacher.teacher.total_steps, start):
            raise UniInstructError(f"training the teacher failed: {failed[teacher.folder]}", remedy=f"see {teacher.output}")
    trainings = [Training(folder=experiment.folder, recipe=experiment.recipe, words=words) for experiment in lab.experiments]
    return _run(trainings, jobs, "experiments", sum(t.recipe.distillation.total_steps for t in trainings), start)


def _run(trainings: Sequence[Training], jobs: int, label: str, steps: int, start: Start) -> dict[Path, str]:
    """Run all trainings to their end, `jobs` at once. Returns folder -> last line of output, for those that failed."""
    waiting, running, failed = list(trainings), dict[Training, StartedTraining](), dict[Path, str]()
    with progress(label, steps, "steps", sum(t.steps_done for t in trainings)) as shown, _terminate_on_exit(running):
        bar = _Bar(shown, trainings)
        while waiting or running:
            while waiting and len(running) < jobs:
                running[waiting[0]] = start(waiting[0], jobs)
                waiting.pop(0)
            time.sleep(POLL_S)
            for training, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[training]
                if process.returncode:
                    failed[training.folder] = _last_line(training.output)
                    _log.warning("%s: %s", training.folder.name, failed[training.folder])
            bar.update(", ".join(t.folder.name for t in running))
    return failed


class _Bar:
    """Updates the progress bar from the runs' logs, so that the child processes need not report their progress."""

    def __init__(self, shown: Progress, trainings: Sequence[Training]):
        self.shown, self.trainings = shown, trainings
        self.done = sum(t.steps_done for t in trainings)

    def update(self, note: str) -> None:
        done = sum(t.steps_done for t in self.trainings)
        self.shown.advance(max(0, done - self.done), note)
        self.done = max(done, self.done)


@contextmanager
def _terminate_on_exit(running: dict[Training, StartedTraining]) -> Iterator[None]:
    """End the running trainings when the block ends, for example by Ctrl-C or SIGTERM. Each saves its state first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # By default SIGTERM would end this process at once, without waiting for the trainings.
    before = signal.signal(signal.SIGTERM, stop) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def _last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").strip().splitlines() if file.exists() else []
    return lines[-1].removeprefix("error: ") if lines else "it ended without any output"
