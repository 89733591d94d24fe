"""The status of a run: progress, speed and scores. Read from the run's small files, without torch and without writing any."""

import dataclasses
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.system.files import JSON_ERRORS
from uni_instruct.train.monitoring.history import History, ScoreLine, WarningLine, read_history
from uni_instruct.train.recipe_file import built_in_recipes, read_yaml, steps_in
from uni_instruct.train.run_lock import FAILED, FINISHED, LOCK, RunProcess, is_locked, read_run_process

RECIPE, LOG = "recipe.yaml", "log.jsonl"
# Stage name in the log -> section of the recipe.
STAGES = {"teacher": "teacher", "generator": "distillation"}
RUNNING, KILLED, PROBABLY_RUNNING, PROBABLY_STOPPED = "running", "killed", "probably running", "probably stopped"
# Without a usable lock, a run counts as stopped if it has been silent for SILENCE times the longest gap between two log lines
# plus a minute, or for UNKNOWN_SILENCE_S if no gap is known.
SILENCE, UNKNOWN_SILENCE_S = 3.0, 600.0


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """The status of one stage. saved_step is the step of the saved state, from which a resumed run continues; None if unknown.

    images_per_s is the present speed, mean_images_per_s that of the whole stage with its evaluations. left_s is estimated from
    the present speed. The scores include their step and kimg.
    """

    name: str
    step: int
    steps: int
    batch: int
    saved_step: int | None
    finished: bool
    images_per_s: float | None
    mean_images_per_s: float | None
    left_s: float | None
    skipped_steps: int
    last_scores: ScoreLine | None
    best_scores: ScoreLine | None

    @property
    def percent(self) -> float:
        """Share of the stage's steps that are done, in 0..100."""
        return 100 * self.step / self.steps

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; scores as in the log."""
        return {
            **dataclasses.asdict(self),
            "last_scores": self.last_scores and self.last_scores.to_dict(),
            "best_scores": self.best_scores and self.best_scores.to_dict(),
            "kimg": self.step * self.batch / 1000,
            "kimgs": self.steps * self.batch / 1000,
            "percent": self.percent,
        }


@dataclass(frozen=True, kw_only=True)
class Status:
    """The status of a run. state is one of the words above, or how its process ended; known_by says how that is known.

    left_s is the sum over all stages, None if the speed of one is not known yet. written: when the run last wrote a file, in
    seconds since 1970. resume: the command that continues the run, None if it is finished.
    """

    run: Path
    recipe: str
    metric: str
    state: str
    known_by: str
    worker: RunProcess | None
    stages: tuple[StageStatus, ...]
    left_s: float | None
    warnings: tuple[WarningLine, ...]
    written: float
    resume: str | None

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, with age_s, the seconds since the run last wrote a file."""
        stages = [stage.to_dict() for stage in self.stages]
        return {
            **dataclasses.asdict(self),
            "run": str(self.run),
            "stages": stages,
            "age_s": max(0.0, time.time() - self.written),
        }


def read_status(folder: Path) -> Status:
    """The status of the run in a folder. Raises RequestError if it is not a run, FileFormatError if its recipe is unusable."""
    _check_is_run(folder)
    recipe = read_yaml(folder / RECIPE)
    lengths = {name: _length(recipe, section, folder) for name, section in STAGES.items() if _is_trained(recipe, name)}
    written = max(file.stat().st_mtime for file in _written(folder))
    histories = read_history(folder / LOG, {name: batch for name, (_, batch) in lengths.items()})
    metric = str(_section(recipe, "loop").get("metric", ""))
    stages = tuple(_stage(folder, name, *lengths[name], history, metric) for name, history in histories.items())
    worker = read_run_process(folder)
    longest_s = max(history.longest_s for history in histories.values())
    state, known_by = _state(folder, worker, all(s.finished for s in stages), time.time() - written, longest_s)
    return Status(
        run=folder,
        recipe=str(recipe.get("name", "")),
        metric=metric,
        state=state,
        known_by=known_by,
        worker=worker,
        stages=stages,
        left_s=_sum([stage.left_s for stage in stages]),
        warnings=tuple(warning for history in histories.values() for warning in history.warnings),
        written=written,
        resume=None if state == FINISHED else resume_command(folder, worker),
    )


def resume_command(folder: Path, worker: RunProcess | None) -> str:
    """The shell command that resumes a run. It names the run's own recipe.yaml, in case a built-in recipe has changed."""
    program, words, moved = ["uni-instruct"], [], False
    if worker is not None:
        program = list(worker.program)
        if (found := shutil.which("uni-instruct")) and program == [str(Path(found).absolute())]:
            program = ["uni-instruct"]
        # --devices is given even for one process. The default on a CPU may be more, and sums over a different number of
        # processes round differently.
        words += ["--devices", str(worker.devices), *["--nice", str(worker.nice)] * (worker.nice > 0)]
        moved = Path(worker.cwd) != Path.cwd()  # paths in the recipe may be relative to the run's working directory
    where = folder.absolute() if moved else folder
    command = shlex.join([*program, "train", str(where / RECIPE), "--out", str(where), *words])
    return f"cd {shlex.quote(worker.cwd)} && {command}" if moved and worker is not None else command


def _check_is_run(folder: Path) -> None:
    if (folder / RECIPE).is_file():
        return
    if not folder.exists():
        if str(folder) in built_in_recipes():
            problem, remedy = f"'{folder}' is a recipe, not a run", "give the folder that was given as --out"
        else:
            problem = f"there is no run {folder}"
            remedy = (
                "give the folder that was given as --out; a training creates it after it has checked recipe, data and teacher"
            )
    elif not folder.is_dir():
        problem, remedy = f"{folder} is a file, not the folder of a run", "give the folder that was given as --out"
    else:
        near = [parent for parent in (folder.absolute().parent, *sorted(folder.iterdir())) if (parent / RECIPE).is_file()]
        problem = f"{folder} is not a run's folder: it has no {RECIPE}"
        remedy = f"give {near[0]}" if near else "give the folder that was given as --out"
    raise RequestError(problem, remedy=remedy, param="recipe")


def _section(recipe: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = recipe.get(name)
    return section if isinstance(section, dict) else {}


def _is_trained(recipe: Mapping[str, object], stage: str) -> bool:
    """Whether the run trains that stage. False for the teacher if the recipe gives one."""
    return stage != "teacher" or not _section(recipe, "teacher").get("bundle")


def _length(recipe: Mapping[str, object], section: str, folder: Path) -> tuple[int, int]:
    """Number of steps and batch size of a stage. Raises FileFormatError if the recipe has no valid ones."""
    kimg, batch = (_section(recipe, section).get(key) for key in ("duration_kimg", "batch"))
    if not isinstance(kimg, int | float) or not isinstance(batch, int) or batch < 1:
        problem = f"{folder / RECIPE} has no valid {section}.duration_kimg or {section}.batch"
        raise FileFormatError(problem, remedy="give the folder of a run, whose recipe.yaml is complete")
    return steps_in(kimg, batch), batch


def _written(folder: Path) -> Iterator[Path]:
    """The files whose modification times tell when a run last wrote. A running run may replace or remove files meanwhile."""
    candidates = [folder / RECIPE, folder / LOG, *folder.glob("state/*.pt"), *folder.glob("samples/*.png")]
    return (file for file in candidates if file.is_file())


def _stage(folder: Path, name: str, steps: int, batch: int, history: History, metric: str) -> StageStatus:
    saved = _saved_step(folder, name)
    step = min(steps, max(history.step, saved or 0))
    # Runs of earlier versions have no saved step. The last line and the bundle then show whether the stage is finished.
    finished = saved >= steps if saved is not None else step >= steps and (folder / name).is_dir()
    # The present speed, not the mean, because a machine that has become slow usually stays slow.
    speed = history.recent_images_per_s
    left_s = 0.0 if finished else (steps - step) * batch / speed if speed else None
    return StageStatus(
        name=name,
        step=step,
        steps=steps,
        batch=batch,
        saved_step=saved,
        finished=finished,
        images_per_s=speed,
        mean_images_per_s=history.images_per_s,
        left_s=left_s,
        skipped_steps=history.skipped_steps,
        last_scores=history.scored[-1] if history.scored else None,
        best_scores=history.best(metric),
    )


def _saved_step(folder: Path, stage: str) -> int | None:
    """The step of the stage's saved state, from the JSON file beside it. None if that file is missing, damaged or older."""
    state = folder / "state" / f"{stage}.pt"
    note = state.with_suffix(".json")
    try:
        return int(json.loads(note.read_text())["step"]) if note.stat().st_mtime >= state.stat().st_mtime else None
    except (OSError, *JSON_ERRORS, TypeError, KeyError, OverflowError):
        return None


def _state(folder: Path, worker: RunProcess | None, done: bool, age_s: float, longest_s: float) -> tuple[str, str]:
    """The state of a run, and how it is known, as text.

    done: all stages are finished. age_s: seconds since the run last wrote. longest_s: longest gap between two log lines.
    """
    locked = is_locked(folder)
    # The operating system guarantees the lock. Everything below is inferred.
    if locked:
        return RUNNING, f"{worker or 'a process'} holds {LOCK}"
    if done:
        return FINISHED, "every stage has reached its last step"
    if worker is not None and worker.ended is not None:
        word, _, _ = worker.ended.partition(":")
        return word, f"{worker} recorded this when it ended" + (
            f": {worker.ended[len(FAILED) + 2 :]}" if word == FAILED else ""
        )
    if worker is not None and worker.is_local and (locked is False or not _exists(worker.pid)):
        return KILLED, f"{worker} no longer exists, and did not record how it ended"
    # In a healthy run the longest gaps are evaluations, so a gap of several times that length means that it has stopped.
    silence_s = 60 + SILENCE * longest_s if longest_s else UNKNOWN_SILENCE_S
    who = f"{worker} did not record that it ended" if worker is not None else f"there is no {LOCK}"
    state = PROBABLY_RUNNING if age_s < silence_s else PROBABLY_STOPPED
    return state, f"judged by the time since the run last wrote, because {who}"


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # PermissionError: the process exists but belongs to another user.
    except PermissionError:
        pass
    return True


def _sum(seconds: list[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return sum(known) if len(known) == len(seconds) else None
