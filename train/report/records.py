"""log.jsonl read back: the curves of each stage, its best evaluation, and the warnings."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from uni_instruct.train.monitoring.history import read_record
from uni_instruct.train.monitoring.scores import SELECTION_METRICS


@dataclass(frozen=True)
class Curve:
    """A metric's values over thousands of images seen, in the order of the log; both lists are as long."""

    kimg: list[float]
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of one evaluation. name is that of the score that the recipe minimises, such as FD(digits-classifier)."""

    step: int
    kimg: float
    name: str
    scores: Mapping[str, float]

    @property
    def value(self) -> float:
        """The score that is minimised."""
        return self.scores[self.name]


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """A line of curves or scores: what was logged after a step, by name."""

    step: int
    kimg: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class StageHistory:
    """What the log says of one stage; warnings are (step, words)."""

    records: list[LogLine] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)

    def curve(self, name: str) -> Curve:
        """The metric of that name, empty where it was never logged; None and values that are not finite are left out."""
        # A curve may begin late, or hold a NaN from a bad step: what is there is drawn.
        points = [(r.kimg, r.values[name]) for r in self.records if math.isfinite(r.values.get(name, math.nan))]
        return Curve([kimg for kimg, _ in points], [value for _, value in points])

    def evaluations(self, metric: str) -> list[Evaluation]:
        """Those by the recipe's metric, FD or KD, in order."""
        found = []
        for record in self.records:
            name = (
                next((n for n in record.values if n.startswith(SELECTION_METRICS[metric].printed)), None)
                if metric in SELECTION_METRICS
                else None
            )
            if name is not None:
                found.append(Evaluation(step=record.step, kimg=record.kimg, name=name, scores=record.values))
        return found

    def best(self, metric: str) -> Evaluation | None:
        """The evaluation whose weights were kept: the lowest, of equal ones the last, as the loop chooses."""
        # Reversed: of equal scores the loop kept the last.
        return min(reversed(self.evaluations(metric)), key=lambda e: e.value, default=None)


def read_history(folder: Path) -> dict[str, StageHistory]:
    """Stage -> its history, in the order of training; empty where the run has no log."""
    file = folder / "log.jsonl"
    return parse_history(file.read_bytes().splitlines()) if file.exists() else {}


def parse_history(lines: Iterable[str | bytes]) -> dict[str, StageHistory]:
    """The same from the log's lines; those that are half written, or written by nobody here, are passed over."""
    stages: dict[str, StageHistory] = {}
    for line in lines:
        record = read_record(line) or {}
        stage, step, kimg = (record.get(key) for key in ("stage", "step", "kimg"))
        if not isinstance(stage, str) or not isinstance(step, int):
            continue
        history = stages.setdefault(stage, StageHistory())
        if "warning" in record:
            history.warnings.append((step, str(record["warning"])))
        elif "changed" not in record and isinstance(kimg, int | float):
            values = {name: value for name, value in record.items() if name not in ("stage", "step", "kimg")}
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            history.records.append(LogLine(step=step, kimg=kimg, values=numbers))
    return stages
