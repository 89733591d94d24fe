"""A lab's trainings as Ray actors: each runs `train` on a node of the cluster, and its files are copied back while it runs.

So the lab's folder holds the runs as if they had been trained here. The progress bar, TensorBoard, the page and resuming work
without knowing about Ray. A training whose actor or node dies is restarted elsewhere, from the last state that was copied back.
"""

import dataclasses
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import yaml

from uni_instruct import __version__
from uni_instruct.sampling.pool import MAX_DEATHS, failure
from uni_instruct.system.files import atomic_file
from uni_instruct.system.ray_cluster import LOCAL, PackedFiles, check_version, connect, contents, import_ray, unpack_files
from uni_instruct.train.config import Recipe
from uni_instruct.train.lab.processes import Training, start_training
from uni_instruct.train.run_lock import LOCK

RECIPE = "recipe.yaml"
# An actor reports new files at this interval, or when its training ends.
_POLL_S = 1.0
Files = dict[str, bytes]  # path relative to the training's folder -> content; the training's output has the name ''


class TrainingProgress(NamedTuple):
    """Files that a training has written and removed since the last report, and its exit code, None while it runs."""

    files: Files
    removed: list[str]
    exit_code: int | None


class RayTrainings:
    """A context manager that starts trainings on the Ray cluster at an address.

    jobs: number of trainings at once, by default one per GPU, or one per node without GPUs. Raises MissingExtraError without
    Ray, RequestError if there is no cluster at the address.
    """

    def __init__(self, address: str, jobs: int | None):
        self._ray = import_ray()
        self._ours = connect(self._ray, address, None)
        resources, nodes = self._ray.cluster_resources(), [node for node in self._ray.nodes() if node["Alive"]]
        gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
        self.jobs = jobs or gpus or len(nodes)
        # An actor's CPUs must all be on one node, so no more than the largest node has.
        largest = max(int(node["Resources"].get("CPU", 1)) for node in nodes)
        share = cpus / self.jobs if self.jobs > cpus else max(1, min(cpus // self.jobs, largest))
        options = {"num_cpus": share, "num_gpus": min(1.0, gpus / self.jobs), "max_restarts": 0}
        self._trainer = self._ray.remote(TrainingActor).options(**options)
        self._sends = address != LOCAL
        self._teachers: dict[str, Any] = {}

    def __enter__(self) -> "RayTrainings":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ours:
            self._ray.shutdown()

    def start(self, training: Training, jobs: int) -> "RemoteTraining":
        """Start or resume a training. Implements `processes.Start`; the number of jobs was given to the constructor."""
        return RemoteTraining(self._ray, self._trainer, training, self._teacher(training) if self._sends else None, self._sends)

    def _teacher(self, training: Training) -> Any:
        """The teacher's files as a Ray object, sent once for all trainings; None if there is nothing to send."""
        bundle = training.recipe.teacher.bundle
        if not bundle or not Path(bundle).exists():  # trained by this training, or found by name on each node (shipped, hub)
            return None
        if bundle not in self._teachers:
            self._teachers[bundle] = self._ray.put(contents(Path(bundle)))
        return self._teachers[bundle]


class RemoteTraining:
    """One training in the cluster. Implements `processes.StartedTraining`."""

    def __init__(self, ray: Any, trainer: Any, training: Training, teacher: Any, sends: bool):
        self._ray, self._trainer, self._training, self._teacher = ray, trainer, training, teacher
        self._sends, self._deaths = sends, 0
        self.returncode: int | None = None
        self._begin()

    def poll(self) -> int | None:
        """The exit code, None while it runs. Writes files that have arrived into the training's folder."""
        if self.returncode is None:
            ready, _ = self._ray.wait([self._answer], timeout=0)
            if ready:
                self._take()
        return self.returncode

    def terminate(self) -> None:
        """Ask the training to save its state and end."""
        if self.returncode is None:
            self._actor.end.remote()

    def wait(self) -> int:
        """Wait until the training has ended. Returns its exit code. A dead actor is not restarted."""
        while self.returncode is None:
            self._ray.wait([self._answer], timeout=None)
            self._take(may_begin=False)
        return self.returncode

    def _begin(self) -> None:
        self._actor = self._trainer.remote()
        before = read_files(self._training) if self._sends else None
        self._begun = self._actor.begin.remote(self._training, before, self._teacher, __version__)
        self._answer = self._actor.progress.remote()

    def _take(self, may_begin: bool = True) -> None:
        """Store the progress that has arrived and request the next. Restart the training if its actor is dead.

        After MAX_DEATHS dead actors, or without may_begin, the training counts as failed, with returncode -1.
        """
        try:
            self._ray.get(self._begun)
            progress: TrainingProgress = self._ray.get(self._answer)
        except self._ray.exceptions.RayTaskError as error:
            raise failure(None, error.cause) from error
        except self._ray.exceptions.RayError as error:
            self._deaths += 1
            if may_begin and self._deaths < MAX_DEATHS:
                self._begin()
                return
            self._training.output.parent.mkdir(parents=True, exist_ok=True)
            with self._training.output.open("a") as output:
                reason = str(error).strip().splitlines()[-1:] or [""]
                given_up = f"the training was given up after {self._deaths} Ray actors died, the last with"
                output.write(f"{given_up} {type(error).__name__}: {reason[0]}\n")
            self.returncode = -1
            return
        apply_progress(progress, self._training)
        self.returncode = progress.exit_code
        if progress.exit_code is None:
            self._answer = self._actor.progress.remote()
        else:
            self._ray.kill(self._actor)


class TrainingActor:
    """The Ray actor: runs one call of `train` on its node."""

    def begin(self, training: Training, before: Files | None, teacher: PackedFiles | None, version: str) -> None:
        """Start the training in its folder, or, if `before` is given, in a new folder of this node with those files.

        teacher: the teacher's files, if they have to be placed on this node. version: the lab's version of this package.
        """
        check_version(version)
        self._own = None if before is None else Path(tempfile.mkdtemp(prefix="uni-instruct-lab-"))
        if self._own is not None:
            training = dataclasses.replace(training, folder=self._own / "run")
            apply_progress(TrainingProgress(before or {}, [], None), training)
        if teacher is not None:
            training = dataclasses.replace(training, recipe=_with_teacher(training.recipe, str(unpack_files(teacher))))
            _set_teacher(training)
        self._training, self._seen = training, _stamps(training) if self._own else {}
        self._process = start_training(training, jobs=1)  # Ray sets OMP_NUM_THREADS for an actor itself

    def progress(self) -> TrainingProgress:
        """Wait up to _POLL_S seconds for the training to end. Returns what is new since the last call."""
        try:
            code: int | None = self._process.wait(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            code = None
        if self._own is None:
            return TrainingProgress({}, [], code)
        now = _stamps(self._training)
        changed = [name for name, stamp in now.items() if self._seen.get(name) != stamp]
        removed = [name for name in self._seen if name not in now]
        self._seen, files = now, read_files(self._training, changed)
        if code is not None:
            shutil.rmtree(self._own, ignore_errors=True)
        return TrainingProgress(files, removed, code)

    def end(self) -> None:
        """Ask the training to save its state and end."""
        self._process.terminate()


def read_files(training: Training, names: Iterable[str] | None = None) -> Files:
    """The named files of a training, by default all. Files that have been removed meanwhile are left out."""
    found = Files()
    for name in _stamps(training) if names is None else names:
        with suppress(FileNotFoundError):
            found[name] = _place(training, name).read_bytes()
    return found


def apply_progress(progress: TrainingProgress, training: Training) -> None:
    """Apply the progress to the training's folder. The recipe there gets this machine's path of the teacher."""
    for name in progress.removed:
        _place(training, name).unlink(missing_ok=True)
    for name, content in progress.files.items():
        with atomic_file(_place(training, name)) as partial:
            partial.write_bytes(content)
    if RECIPE in progress.files:
        _set_teacher(training)


def _place(training: Training, name: str) -> Path:
    return training.folder / name if name else training.output


def _stamps(training: Training) -> dict[str, tuple[int, int]]:
    """Modification time and size of each file of a training, to detect changes.

    Leaves out the lock, which belongs to the process, and hidden files, which are still being written.
    """
    found = {}
    for file in (training.output, *training.folder.rglob("*")):
        hidden = file.name.startswith(".") or file.name == LOCK
        with suppress(FileNotFoundError):
            if not hidden and file.is_file():
                facts = file.stat()
                name = "" if file == training.output else file.relative_to(training.folder).as_posix()
                found[name] = facts.st_mtime_ns, facts.st_size
    return found


def _with_teacher(recipe: Recipe, bundle: str) -> Recipe:
    return dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, bundle=bundle))


# A resumed run compares its own recipe with the given one, and a path of another node would be invalid on this one.
def _set_teacher(training: Training) -> None:
    """Write the teacher's path into the recipe in the training's folder, if there already is one."""
    file = training.folder / RECIPE
    if not file.exists():
        return
    recipe = yaml.safe_load(file.read_text())
    recipe["teacher"]["bundle"] = training.recipe.teacher.bundle
    with atomic_file(file) as partial:
        partial.write_text(yaml.safe_dump(recipe, sort_keys=False))
