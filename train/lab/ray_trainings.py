"""A lab's trainings as Ray actors: each runs `train` on a node of the cluster, and what it writes comes back as it grows.

So the lab's folder holds the runs as if they had been trained here: the bar, TensorBoard, the page, and going on with the same
command need not know. A training whose actor or node dies begins again elsewhere, from the last state that came back.
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
from uni_instruct.files import atomic_file
from uni_instruct.ray_cluster import LOCAL, Contents, check_version, connect, contents, import_ray, place_contents
from uni_instruct.sampling.pool import MAX_DEATHS, failure
from uni_instruct.train.config import Recipe
from uni_instruct.train.lab.processes import Training, start_training
from uni_instruct.train.run_lock import LOCK

RECIPE = "recipe.yaml"
# How long an actor waits for its training to end before it says what is new.
_LOOK_S = 1.0
Files = dict[str, bytes]  # by their place in a training's folder; what it prints is under ''


class TrainingProgress(NamedTuple):
    """What a training has written and removed since it was last asked, and its exit code, None while it runs."""

    files: Files
    removed: list[str]
    exit_code: int | None


class RayTrainings:
    """Starts trainings on the Ray at an address, as a context. jobs: how many at once, None for one a GPU, else one a node.

    Raises MissingExtraError without Ray, RequestError where there is no such cluster.
    """

    def __init__(self, address: str, jobs: int | None):
        self._ray = import_ray()
        self._ours = connect(self._ray, address, None)
        resources, nodes = self._ray.cluster_resources(), [node for node in self._ray.nodes() if node["Alive"]]
        gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
        self.jobs = jobs or gpus or len(nodes)
        # A training fits on one node, whatever the others have.
        largest = max(int(node["Resources"].get("CPU", 1)) for node in nodes)
        share = cpus / self.jobs if self.jobs > cpus else max(1, min(cpus // self.jobs, largest))
        options = {"num_cpus": share, "num_gpus": min(1.0, gpus / self.jobs), "max_restarts": 0}
        self._trainer = self._ray.remote(Trainer).options(**options)
        self._sends = address != LOCAL
        self._teachers: dict[str, Any] = {}

    def __enter__(self) -> "RayTrainings":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._ours:
            self._ray.shutdown()

    def start(self, training: Training, jobs: int) -> "RemoteTraining":
        """Begins a training, or goes on with it; see `processes.Started`."""
        return RemoteTraining(self._ray, self._trainer, training, self._teacher(training) if self._sends else None, self._sends)

    def _teacher(self, training: Training) -> Any:
        """The teacher's files, sent once for all trainings; None where the training makes its own."""
        bundle = training.recipe.teacher.bundle
        if not bundle or not Path(bundle).exists():  # a shipped one, or on the hub: nodes find it by its name
            return None
        if bundle not in self._teachers:
            self._teachers[bundle] = self._ray.put(contents(Path(bundle)))
        return self._teachers[bundle]


class RemoteTraining:
    """One training somewhere in the cluster; see `processes.Started`."""

    def __init__(self, ray: Any, trainer: Any, training: Training, teacher: Any, sends: bool):
        self._ray, self._trainer, self._training, self._teacher = ray, trainer, training, teacher
        self._sends, self._deaths = sends, 0
        self.returncode: int | None = None
        self._begin()

    def poll(self) -> int | None:
        """The exit code, None while it runs. What has come back is in the training's folder."""
        if self.returncode is None:
            ready, _ = self._ray.wait([self._answer], timeout=0)
            if ready:
                self._take()
        return self.returncode

    def terminate(self) -> None:
        """Asks it to save its state and end."""
        if self.returncode is None:
            self._actor.end.remote()

    def wait(self) -> int:
        """Until it has ended."""
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
        """Stores the progress that has arrived and asks for the next. Restarts the training if its actor is dead."""
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
                output.write(f"{self._deaths} actors died over it, the last by {type(error).__name__}: {reason[0]}\n")
            self.returncode = -1
            return
        keep(progress, self._training)
        self.returncode = progress.exit_code
        if progress.exit_code is None:
            self._answer = self._actor.progress.remote()
        else:
            self._ray.kill(self._actor)


class Trainer:
    """What lives in a Ray worker: one call of `train`."""

    def begin(self, training: Training, before: Files | None, teacher: Contents | None, version: str) -> None:
        """Starts it in its folder; where `before` is given, in a folder of this node that has those files."""
        check_version(version)
        self._own = None if before is None else Path(tempfile.mkdtemp(prefix="uni-instruct-lab-"))
        if self._own is not None:
            training = dataclasses.replace(training, folder=self._own / "run")
            keep(TrainingProgress(before or {}, [], None), training)
        if teacher is not None:
            training = dataclasses.replace(training, recipe=_with_teacher(training.recipe, str(place_contents(teacher))))
            _set_teacher(training)
        self._training, self._seen = training, _stamps(training) if self._own else {}
        self._process = start_training(training, jobs=1)  # Ray has set how many threads there are for an actor

    def progress(self) -> TrainingProgress:
        """What is new, after a moment."""
        try:
            code: int | None = self._process.wait(timeout=_LOOK_S)
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
        """Asks the training to save its state and end."""
        self._process.terminate()


def read_files(training: Training, names: Iterable[str] | None = None) -> Files:
    """Those files of a training, by default all; what has been removed meanwhile is left out."""
    found = Files()
    for name in _stamps(training) if names is None else names:
        with suppress(FileNotFoundError):
            found[name] = _place(training, name).read_bytes()
    return found


def keep(progress: TrainingProgress, training: Training) -> None:
    """Writes what is new into the training's folder, with the teacher's path as its recipe has it."""
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
    """When each file was written last, and its size. The lock is its process's, and hidden files are half written."""
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


# A run that goes on compares its own recipe with the one that it is given, and the path of another node leads nowhere.
def _set_teacher(training: Training) -> None:
    """Puts the teacher's path into the recipe in the training's folder, where there is one already."""
    file = training.folder / RECIPE
    if not file.exists():
        return
    recipe = yaml.safe_load(file.read_text())
    recipe["teacher"]["bundle"] = training.recipe.teacher.bundle
    with atomic_file(file) as partial:
        partial.write_text(yaml.safe_dump(recipe, sort_keys=False))
