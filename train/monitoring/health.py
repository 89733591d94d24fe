"""Warnings about a training that goes wrong: what the logged metrics show, and which recipe key to change."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# The first lines are not used for comparison with the past: the fake score starts as a copy of the teacher, at distance zero.
SETTLING = 10
WINDOW = 50


@dataclass
class MetricHistory:
    """One metric's past: its values on the last WINDOW lines, newest last, and its lowest, without the first SETTLING lines."""

    seen: int = 0
    lowest: float = math.inf
    recent: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Add the value of one more line."""
        self.seen += 1
        # A new list, because a saved state may still refer to the old one.
        self.recent = [*self.recent, value][-WINDOW:]
        if self.seen > SETTLING:
            self.lowest = min(self.lowest, value)


@dataclass(frozen=True, kw_only=True)
class DerivedMetric:
    """A value computed from a metric and its past. Symptoms read it by its name, like a logged metric.

    read(value, history): history does not include the value yet. Returns None if there is too little past.
    """

    name: str
    metric: str
    read: Callable[[float, MetricHistory], float | None]


def times_lowest(value: float, history: MetricHistory) -> float | None:
    """value / lowest value so far; None while there is none."""
    return value / history.lowest if 0 < history.lowest < math.inf else None


def times_median(value: float, history: MetricHistory) -> float | None:
    """value / median of the last WINDOW lines; None before SETTLING lines."""
    # The median rather than the mean, because the past may contain a few spikes.
    median = statistics.median(history.recent) if len(history.recent) >= SETTLING else 0.0
    return value / median if median > 0 else None


def rise(value: float, history: MetricHistory) -> float | None:
    """value - value of the last line: how much a count has grown; None on the first line."""
    return value - history.recent[-1] if history.recent else None


DERIVED_METRICS = {
    d.name: d
    for d in (
        DerivedMetric(name="generator/score_distance:times_lowest", metric="generator/score_distance", read=times_lowest),
        DerivedMetric(name="teacher/loss:times_lowest", metric="teacher/loss", read=times_lowest),
        DerivedMetric(name="generator/gradient_norm:times_median", metric="generator/gradient_norm", read=times_median),
        DerivedMetric(name="critic/gradient_norm:times_median", metric="critic/gradient_norm", read=times_median),
        DerivedMetric(name="skipped_steps:rise", metric="skipped_steps", read=rise),
    )
}


@dataclass(frozen=True, kw_only=True)
class HealthyRange:
    """The healthy range of a logged or derived metric. Both ends, low and high, are healthy."""

    metric: str
    low: float = -math.inf
    high: float = math.inf

    def violation(self, values: Mapping[str, float]) -> float | None:
        """The metric's value if it is outside the range, else None."""
        value = values[self.metric]
        return value if value < self.low or value > self.high else None


@dataclass(frozen=True, kw_only=True)
class Symptom:
    """One row of SYMPTOMS: the warning's text with {value} in it, the recipe keys to change, and the healthy range.

    A log line without that metric does not change the symptom's counts.
    """

    name: str
    words: str
    remedy: str
    healthy: HealthyRange


# A discriminator with an accuracy of one half is not a symptom: it cannot tell the generator's images from real ones, which is
# the aim of training.
SYMPTOMS = {
    s.name: s
    for s in (
        Symptom(
            name="collapse",
            words="generated images vary {value:.2f} times as much as the teacher's: mode collapse of the generator",
            remedy="raise objective.critic_updates or lower distillation.generator_learning_rate",
            healthy=HealthyRange(metric="generator/diversity", low=0.5),
        ),
        Symptom(
            name="discriminator won",
            words="the discriminator is right on {value:.1%} of the images: the density ratio is unreliable",
            remedy="raise objective.tmin, or lower objective.adversarial_scale or distillation.critic_learning_rate",
            healthy=HealthyRange(metric="discriminator/accuracy", high=0.97),
        ),
        Symptom(
            name="ratio at the clamp",
            words="{value:.0%} of the log-ratios are clamped: the gradient is no longer that of the divergence",
            remedy="raise objective.tmin, or objective.logit_clamp where the effective sample size is high",
            healthy=HealthyRange(metric="ratio/clamped", high=0.1),
        ),
        Symptom(
            name="few samples count",
            words="the effective sample size of the density ratios is {value:.1%} of the batch: few images make the gradient",
            remedy="lower objective.logit_clamp or raise objective.tmin",
            healthy=HealthyRange(metric="ratio/effective_sample_size", low=0.1),
        ),
        Symptom(
            name="fake score lags",
            words="teacher and fake score are {value:.1f} times as far apart as at their closest: the fake score lags behind",
            remedy="raise objective.critic_updates or distillation.critic_learning_rate, "
            "or lower distillation.generator_learning_rate",
            healthy=HealthyRange(metric="generator/score_distance:times_lowest", high=3.0),
        ),
        Symptom(
            name="teacher diverges",
            words="the teacher's loss is {value:.1f} times the lowest that it has been: its training diverges",
            remedy="lower teacher.learning_rate",
            healthy=HealthyRange(metric="teacher/loss:times_lowest", high=3.0),
        ),
        Symptom(
            name="generator explodes",
            words=f"the generator's gradient is {{value:.0f}} times its median of the last {WINDOW} lines: it explodes",
            remedy="lower distillation.generator_learning_rate or objective.logit_clamp",
            healthy=HealthyRange(metric="generator/gradient_norm:times_median", high=20.0),
        ),
        Symptom(
            name="critic explodes",
            words=f"the critic's gradient is {{value:.0f}} times its median of the last {WINDOW} lines: it explodes",
            remedy="lower distillation.critic_learning_rate",
            healthy=HealthyRange(metric="critic/gradient_norm:times_median", high=20.0),
        ),
        Symptom(
            name="steps skipped",
            words="{value:.0f} steps were skipped since the last line: their gradients are not finite",
            remedy="lower distillation.generator_learning_rate and distillation.critic_learning_rate",
            healthy=HealthyRange(metric="skipped_steps:rise", high=0.0),
        ),
    )
}


@dataclass
class Streak:
    """The course of a symptom: lines in a row with it, lines in a row without it, and whether it has been reported."""

    sick_lines: int = 0
    well_lines: int = 0
    reported: bool = False

    def count(self, sick: bool, patience: int) -> bool:
        """Count one more line. Returns whether the symptom has to be reported now."""
        self.sick_lines, self.well_lines = (self.sick_lines + 1, 0) if sick else (0, self.well_lines + 1)
        # Reported again only after `patience` healthy lines. A metric that oscillates around its bound is reported once.
        if self.well_lines >= patience:
            self.reported = False
        due = self.sick_lines >= patience and not self.reported
        self.reported = self.reported or due
        return due


class Health:
    """Examines a stage's log lines. A symptom is reported when it has lasted for `patience` lines.

    It is reported once, and again only after it has been absent for `patience` lines.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self._histories: dict[str, MetricHistory] = {}
        self._streaks: dict[str, Streak] = {}

    def examine(self, metrics: Mapping[str, float]) -> list[str]:
        """Add one log line. Returns the warnings to show now, each as '<what is wrong>; <what to change>'."""
        # Derived values compare this line with the lines before it, without itself.
        values = {**metrics, **self._derived(metrics)}
        warnings = []
        for symptom in SYMPTOMS.values():
            if symptom.healthy.metric not in values:
                continue
            value = symptom.healthy.violation(values)
            if self._streaks.setdefault(symptom.name, Streak()).count(value is not None, self.patience):
                warnings.append(f"{symptom.words.format(value=value)}; {symptom.remedy}")
        return warnings

    def state_dict(self) -> dict[str, Any]:
        """The counts and histories, as plain dicts, so that a resumed run warns as the uninterrupted one would."""
        # "trails" and "courses" are the keys of saved states; renaming them would make old states unreadable.
        return {
            "trails": {metric: dataclasses.asdict(history) for metric, history in self._histories.items()},
            "courses": {name: dataclasses.asdict(streak) for name, streak in self._streaks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Later lines do not modify the given state."""
        self._histories = {metric: MetricHistory(**history) for metric, history in state["trails"].items()}
        self._streaks = {name: Streak(**streak) for name, streak in state["courses"].items()}

    def _derived(self, metrics: Mapping[str, float]) -> dict[str, float]:
        found = {}
        for derived in DERIVED_METRICS.values():
            value = metrics.get(derived.metric, math.nan)
            if not math.isfinite(value):
                continue  # absent, or not finite, which would make all later comparisons useless
            history = self._histories.setdefault(derived.metric, MetricHistory())
            result = derived.read(value, history)
            history.add(value)
            if result is not None:
                found[derived.name] = result
        return found
