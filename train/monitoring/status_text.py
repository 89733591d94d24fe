"""A run's status as text for the terminal."""

import time

from uni_instruct.train.monitoring.history import ScoreLine
from uni_instruct.train.monitoring.status import RUNNING, StageStatus, Status
from uni_instruct.train.run_lock import FINISHED

_UNITS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))


def status_text(status: Status) -> str:
    """The status as about ten lines for a terminal."""
    now = time.time()
    lines = [f"{status.run} ({status.recipe}): {status.state} ({status.known_by})"]
    if status.worker is not None and status.state == RUNNING:
        lines[0] += f", for {duration(now - status.worker.started)}"
    under_way = next((stage for stage in status.stages if not stage.finished), None)
    for stage in status.stages:
        begun = stage is under_way and status.state.endswith(RUNNING)
        lines.append(f"{stage.name}: {_progress(stage, begun)}")
        lines += [f"  {line}" for line in (*_quality(stage, status.metric), *_skipped(stage))]
    if status.state != FINISHED:
        lines.append(_whole(status))
    lines += [f"warning: {w.stage}, step {w.step}: {w.warning}" for w in status.warnings]
    lines.append(f"last written: {duration(now - status.written)} ago")
    if status.resume is not None:
        label = "if it stops, resume with" if status.state.endswith(RUNNING) else "resume with"
        lines.append(f"{label}: {status.resume}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A duration in at most two units: 42 s, 3 min 20 s, 5 h 10 min, 2 d 3 h."""
    # If the clock was set back, the age of a file is negative.
    seconds = max(0, round(seconds))
    for large_s, large, small_s, small in _UNITS:
        if seconds >= large_s:
            return f"{seconds // large_s} {large} {seconds % large_s // small_s} {small}"
    return f"{seconds} s"


def _progress(stage: StageStatus, begun: bool) -> str:
    if not stage.step:
        # Before the first log line or saved state, only the process itself knows how far it is.
        return f"{'no log line yet' if begun else 'not started'}, {stage.steps:,} steps ({_kimg(stage, stage.steps)} kimg) left"
    how_far = f"step {stage.step:,} of {stage.steps:,} ({_kimg(stage, stage.step)} of {_kimg(stage, stage.steps)} kimg"
    parts = [f"{how_far}, {int(stage.percent)} %)"]
    if stage.images_per_s and stage.mean_images_per_s:
        parts.append(f"{stage.images_per_s:,.0f} images/s at present, {stage.mean_images_per_s:,.0f} over the stage")
    if stage.finished:
        parts.append("finished")
    else:
        if stage.left_s is not None:
            parts.append(f"{duration(stage.left_s)} left")
        if stage.saved_step is not None:
            parts.append(f"state saved at step {stage.saved_step:,}")
    return "; ".join(parts)


def _kimg(stage: StageStatus, steps: int) -> str:
    kimg = steps * stage.batch / 1000
    return f"{round(kimg, 1 if kimg >= 100 else 3):,}"


def _quality(stage: StageStatus, metric: str) -> list[str]:
    """Lines with the last scores and, if they differ, the best."""
    last, best = stage.last_scores, stage.best_scores
    if last is None:
        return ["no scores: the recipe's metric is 'none'"] if metric == "none" and stage.step else []
    # One line if the last scores are the best, so that they are not mistaken for two evaluations.
    if best is None or best.step == last.step:
        return [f"{'best and last' if best else 'last'} scores {_scores(last)}"]
    return [f"last scores {_scores(last)}", f"best scores {_scores(best)}"]


def _scores(line: ScoreLine) -> str:
    return f"at {line.kimg:g} kimg: " + ", ".join(f"{name} {value:.4g}" for name, value in line.scores.items())


def _skipped(stage: StageStatus) -> list[str]:
    return [f"skipped steps: {stage.skipped_steps:,}"] if stage.step else []


def _whole(status: Status) -> str:
    if status.left_s is not None:
        return f"whole run: {duration(status.left_s)} left at the present speed"
    unknown = " and ".join(f"the {stage.name}'s" for stage in status.stages if stage.left_s is None)
    return f"whole run: the time left is not known before {unknown} first log line"
