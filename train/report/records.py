"""Reads log.jsonl for the report: the curves of each stage, its evaluations, and the warnings."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from uni_instruct.train.monitoring.history import read_record
from uni_instruct.train.monitoring.scores import SELECTION_METRICS


@dataclass(frozen=True)
class Curve:
    """A metric's values over thousands of images seen, in the order of the log. Both lists have the same length."""

    kimg: list[float]
    values: list[float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of one evaluation. name: the score that the recipe minimises, for example FD(digits-classifier)."""

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
    """A line of curves or scores: the values logged after a step, by name."""

    step: int
    kimg: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class StageHistory:
    """One stage's log lines; warnings are (step, text)."""

    records: list[LogLine] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)

    def curve(self, name: str) -> Curve:
        """The curve of that metric; empty if it was never logged. Values that are not finite are left out."""
        # A curve may start late, or contain a NaN of a bad step. The other points are still drawn.
        points = [(r.kimg, r.values[name]) for r in self.records if math.isfinite(r.values.get(name, math.nan))]
        return Curve([kimg for kimg, _ in points], [value for _, value in points])

    def evaluations(self, metric: str) -> list[Evaluation]:
        """The evaluations by the recipe's metric (FD or KD), in the order of the log."""
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
        """The evaluation whose weights were kept: the one with the lowest score; None if there is none."""
        # Reversed, because among equal scores the training loop keeps the last.
        return min(reversed(self.evaluations(metric)), key=lambda e: e.value, default=None)


def read_history(folder: Path) -> dict[str, StageHistory]:
    """Stage -> its history, in the order of training; empty if the run has no log."""
    file = folder / "log.jsonl"
    return parse_history(file.read_bytes().splitlines()) if file.exists() else {}


def parse_history(lines: Iterable[str | bytes]) -> dict[str, StageHistory]:
    """As `read_history`, from the log's lines. Incomplete lines, left by a killed run, and foreign lines are skipped."""
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
