"""The results of a lab's experiments, read from their logs: all evaluations of each, and the one of its best weights."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from uni_instruct.train.lab.experiments import Experiment, Lab, Variant
from uni_instruct.train.monitoring.clock import read_times
from uni_instruct.train.report.records import Evaluation, StageHistory, read_history

DIVERSITY = "generator/diversity"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One experiment's result: evaluations in order, the one whose weights were kept, seconds of its steps, why it failed."""

    experiment: Experiment
    history: StageHistory
    evaluations: tuple[Evaluation, ...]
    best: Evaluation | None
    steps_s: float
    failure: str = ""


class VariantJson(TypedDict):
    """A variant in lab.json. best_kimg and each list in scores have one value for each seed with an evaluation."""

    variant: str
    method: str
    settings: list[str]
    seeds: list[int]
    best_kimg: list[float]
    scores: dict[str, list[float]]
    steps_s: list[float]
    failures: list[str]


class Axis:
    """A quantity of an experiment at each of its evaluations: a score, or the value of a curve at the nearest log line."""

    def __init__(self, label: str, read: Callable[[Outcome, Evaluation], float | None]):
        self.label, self.read = label, read

    def known(self, outcomes: Sequence[Outcome]) -> bool:
        """Whether any experiment has this quantity."""
        return any(self.read(o, e) is not None for o in outcomes for e in o.evaluations)


def _score(name: str) -> Callable[[Outcome, Evaluation], float | None]:
    return lambda _, evaluation: evaluation.scores.get(name)


def _diversity(outcome: Outcome, evaluation: Evaluation) -> float | None:
    curve = outcome.history.curve(DIVERSITY)
    if not curve.values:
        return None
    nearest = min(range(len(curve.kimg)), key=lambda i: abs(curve.kimg[i] - evaluation.kimg))
    return curve.values[nearest]


# The first known quantity of each list is drawn. Evaluations omit precision and recall if the data set is large.
QUALITY_AXES = (Axis("precision", _score("precision")), Axis("class accuracy", _score("class_accuracy")))
DIVERSITY_AXES = (Axis("recall", _score("recall")), Axis("diversity (student / teacher; 1 is equal)", _diversity))


def read_outcomes(lab: Lab, failed: Mapping[Path, str]) -> list[Outcome]:
    """The outcomes of all experiments, in their order. failed: folder -> reason."""
    return [_outcome(experiment, failed.get(experiment.folder, "")) for experiment in lab.experiments]


def teacher_best(lab: Lab) -> Evaluation | None:
    """The best evaluation of the teacher that the lab trained; None if the recipe gives the teacher."""
    history = read_history(lab.teacher_run).get("teacher")
    return history.best(lab.experiments[0].recipe.loop.metric) if history else None


def metric_name(outcomes: Sequence[Outcome]) -> str:
    """The name of the score by which all are compared, such as FD(digits-classifier); empty if nothing was scored."""
    return next((o.best.name for o in outcomes if o.best is not None), "")


def ranked(lab: Lab, outcomes: Sequence[Outcome]) -> list[tuple[Variant, list[Outcome]]]:
    """Variants with their experiments, ordered by mean score, the best (lowest) first. Variants without a score come last."""
    groups = [(variant, [o for o in outcomes if o.experiment.variant == variant]) for variant in lab.variants]

    def order(group: tuple[Variant, list[Outcome]]) -> tuple[bool, float]:
        values = [o.best.value for o in group[1] if o.best is not None]
        return (not values, statistics.fmean(values) if values else 0.0)

    return sorted(groups, key=order)


def values_of(outcomes: Sequence[Outcome], name: str) -> list[float]:
    """That score of the best weights of each experiment, without experiments that lack it."""
    return [o.best.scores[name] for o in outcomes if o.best is not None and name in o.best.scores]


def to_json(lab: Lab, outcomes: Sequence[Outcome]) -> str:
    """The content of lab.json: an entry for each variant, the best first."""
    entries = []
    for variant, group in ranked(lab, outcomes):
        best = [o.best for o in group if o.best is not None]
        names = dict.fromkeys(name for evaluation in best for name in evaluation.scores if "/" not in name)
        entries.append(
            VariantJson(
                variant=variant.name,
                method=variant.method,
                settings=list(variant.settings),
                seeds=[o.experiment.seed for o in group],
                best_kimg=[evaluation.kimg for evaluation in best],
                scores={name: values_of(group, name) for name in names},
                steps_s=[round(o.steps_s, 1) for o in group],
                failures=[o.failure for o in group if o.failure],
            )
        )
    return json.dumps({"metric": metric_name(outcomes), "variants": entries}, indent=2) + "\n"


def _outcome(experiment: Experiment, failure: str) -> Outcome:
    history = read_history(experiment.folder).get("generator", StageHistory())
    metric = experiment.recipe.loop.metric
    return Outcome(
        experiment=experiment,
        history=history,
        evaluations=tuple(history.evaluations(metric)),
        best=history.best(metric),
        steps_s=read_times(experiment.folder).get("generator", {}).get("steps", 0.0),
        failure=failure,
    )
