"""What a run's log.jsonl says, read fast and without torch: a long run's is a hundred megabytes, nearly all of it curves."""

import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from uni_instruct.files import JSON_ERRORS
from uni_instruct.train.monitoring.scores import SELECTION_METRICS

# The speed of so many of the last lines is the present one: a line alone may hold an evaluation.
RECENT_LINES = 10
WARNINGS = 3
_PLACE = ("stage", "step", "kimg")
# Of a line of curves the head and the speed are all that counts; reading all of it as JSON takes ten times as long.
_CURVES = re.compile(rb'\{"stage": "(\w+)", "step": (\d+),.*"images_per_s": (\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)[,}].*')


@dataclass(frozen=True, kw_only=True)
class ScoreLine:
    """One evaluation: after which step and how many thousand images, and its scores by name."""

    stage: str
    step: int
    kimg: float
    scores: dict[str, float]

    def to_dict(self) -> dict[str, str | float]:
        """As the line stands in the log."""
        return {"stage": self.stage, "step": self.step, "kimg": self.kimg, **self.scores}


@dataclass(frozen=True, kw_only=True)
class WarningLine:
    """What training warned of, in words."""

    stage: str
    step: int
    warning: str


@dataclass
class History:
    """One stage's past: the last step that was heard of, and what its lines hold.

    images and time_s add up the curves' lines, longest_s is the longest time between two; recent has the last of both.
    """

    step: int = 0
    curve_step: int = 0
    images: int = 0
    time_s: float = 0.0
    longest_s: float = 0.0
    recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=RECENT_LINES))
    scored: list[ScoreLine] = field(default_factory=list)
    warnings: list[WarningLine] = field(default_factory=list)
    last_line: bytes = b"{}"

    def add_speed(self, step: int, batch: int, images_per_s: float, line: bytes) -> None:
        """Takes in a line of curves. Its speed is that since the line before it, whatever happened between the two."""
        # A resumed run logs steps again; they are no new images.
        images = max(0, step - self.curve_step) * batch
        self.step, self.curve_step, self.last_line = max(self.step, step), step, line
        if images_per_s > 0:
            seconds = images / images_per_s
            self.images, self.time_s = self.images + images, self.time_s + seconds
            self.longest_s = max(self.longest_s, seconds)
            self.recent.append((images, seconds))

    @property
    def images_per_s(self) -> float | None:
        """Over the whole stage, evaluations included; None before the first line."""
        return self.images / self.time_s if self.time_s else None

    @property
    def recent_images_per_s(self) -> float | None:
        """Over the last lines."""
        seconds = sum(s for _, s in self.recent)
        return sum(images for images, _ in self.recent) / seconds if seconds else None

    @property
    def skipped_steps(self) -> int:
        """Updates left out so far because they were not finite."""
        skipped = (read_record(self.last_line) or {}).get("skipped_steps", 0)
        return int(skipped) if isinstance(skipped, int | float) else 0

    def best(self, metric: str) -> ScoreLine | None:
        """The evaluation with the lowest value of a recipe's metric; None where there is none yet."""
        valued = [(_value(line.scores, metric), line) for line in self.scored]
        # A NaN, which is not equal to itself, is no score.
        found = [(value, line) for value, line in valued if value is not None and value == value]
        return min(found, key=lambda pair: pair[0])[1] if found else None


def read_history(file: Path, batches: dict[str, int]) -> dict[str, History]:
    """The past of each stage in `batches`, which gives its batch. A missing file is an empty one.

    Lines that are half written, or written by nobody here, are passed over.
    """
    stages = {name: History() for name in batches}
    for line in _lines(file):
        curves = _CURVES.fullmatch(line)
        record = None if curves else read_record(line)
        if curves and (name := curves[1].decode()) in stages and line.endswith(b"}"):
            stages[name].add_speed(int(curves[2]), batches[name], float(curves[3]), line)
        elif record is not None and (stage := str(record.get("stage"))) in stages and isinstance(record.get("step"), int):
            _add(stages[stage], stage, record)
    return stages


def _add(history: History, stage: str, record: dict[str, object]) -> None:
    """Takes in a line that is none of curves."""
    step, kimg = record["step"], record.get("kimg")
    assert isinstance(step, int)
    history.step = max(history.step, step)
    if "warning" in record:
        line = WarningLine(stage=stage, step=step, warning=str(record["warning"]))
        history.warnings = [*history.warnings, line][-WARNINGS:]
    elif isinstance(kimg, int | float):
        scores = {name: value for name, value in record.items() if name not in _PLACE and isinstance(value, int | float)}
        history.scored.append(ScoreLine(stage=stage, step=step, kimg=kimg, scores=scores))


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as stream:
            for line in stream:
                yield line.rstrip(b"\n")
    # A run that has just begun has no log yet.
    except FileNotFoundError:
        return


def read_record(line: str | bytes) -> dict[str, object] | None:
    """What a line of log.jsonl says; None where it says nothing: a killed run leaves one half written, and people edit."""
    try:
        record = json.loads(line)
    except JSON_ERRORS:
        return None
    return record if isinstance(record, dict) else None


def _value(scores: dict[str, float], metric: str) -> float | None:
    printed: tuple[str, ...] = SELECTION_METRICS[metric].printed if metric in SELECTION_METRICS else ()
    return next((value for name, value in scores.items() if name.startswith(printed)), None)
