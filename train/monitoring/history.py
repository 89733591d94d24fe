"""Reads a run's log.jsonl, fast and without torch. For a long run it has a hundred megabytes, almost all of them curves."""

import json
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from uni_instruct.system.files import JSON_ERRORS
from uni_instruct.train.monitoring.scores import SELECTION_METRICS

# The present speed is taken over this many lines, because the time of a single line may include an evaluation.
RECENT_LINES = 10
WARNINGS = 3
_PLACE = ("stage", "step", "kimg")
# Of a line of curves only the head and the speed are needed. Parsing the whole line as JSON takes ten times as long.
_CURVES = re.compile(rb'\{"stage": "(\w+)", "step": (\d+),.*"images_per_s": (\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)[,}].*')


@dataclass(frozen=True, kw_only=True)
class ScoreLine:
    """One evaluation: its stage, step, thousands of images seen, and scores by name."""

    stage: str
    step: int
    kimg: float
    scores: dict[str, float]

    def to_dict(self) -> dict[str, str | float]:
        """The same keys as the line in the log."""
        return {"stage": self.stage, "step": self.step, "kimg": self.kimg, **self.scores}


@dataclass(frozen=True, kw_only=True)
class WarningLine:
    """One warning that training logged, as text."""

    stage: str
    step: int
    warning: str


@dataclass
class History:
    """One stage's log: its last step, speeds, evaluations and warnings.

    step is the last step of any line, curve_step that of the last line of curves. images and time_s are sums over the lines of
    curves; longest_s is the longest time between two of them; recent has (images, seconds) of the last RECENT_LINES.
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
        """Add a line of curves. Its speed is the average since the previous line, including evaluations in between."""
        # A resumed run logs some steps a second time. Their images are not new.
        images = max(0, step - self.curve_step) * batch
        self.step, self.curve_step, self.last_line = max(self.step, step), step, line
        if images_per_s > 0:
            seconds = images / images_per_s
            self.images, self.time_s = self.images + images, self.time_s + seconds
            self.longest_s = max(self.longest_s, seconds)
            self.recent.append((images, seconds))

    @property
    def images_per_s(self) -> float | None:
        """Mean speed of the whole stage, evaluations included; None before the first line."""
        return self.images / self.time_s if self.time_s else None

    @property
    def recent_images_per_s(self) -> float | None:
        """Mean speed of the last RECENT_LINES lines of curves: sum of images / sum of seconds; None before the first line."""
        seconds = sum(s for _, s in self.recent)
        return sum(images for images, _ in self.recent) / seconds if seconds else None

    @property
    def skipped_steps(self) -> int:
        """Number of updates skipped so far because their gradient was not finite, from the last line of curves."""
        skipped = (read_record(self.last_line) or {}).get("skipped_steps", 0)
        return int(skipped) if isinstance(skipped, int | float) else 0

    def best(self, metric: str) -> ScoreLine | None:
        """The evaluation with the lowest value of the recipe's metric (FD or KD); None if there is none yet."""
        valued = [(_value(line.scores, metric), line) for line in self.scored]
        # `value == value` is false for NaN, which is not a score.
        found = [(value, line) for value, line in valued if value is not None and value == value]
        return min(found, key=lambda pair: pair[0])[1] if found else None


def read_history(file: Path, batches: dict[str, int]) -> dict[str, History]:
    """The history of each stage in `batches` (stage -> batch size). A missing file counts as empty.

    Lines that are incomplete or not in the log's format are skipped.
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
    """Add a line that is not a line of curves: a warning or an evaluation."""
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
    # A run that has just started has no log yet.
    except FileNotFoundError:
        return


def read_record(line: str | bytes) -> dict[str, object] | None:
    """Parse a line of log.jsonl; None if it is not a record: a killed run leaves an incomplete line, and users edit files."""
    try:
        record = json.loads(line)
    except JSON_ERRORS:
        return None
    return record if isinstance(record, dict) else None


def _value(scores: dict[str, float], metric: str) -> float | None:
    printed: tuple[str, ...] = SELECTION_METRICS[metric].printed if metric in SELECTION_METRICS else ()
    return next((value for name, value in scores.items() if name.startswith(printed)), None)
