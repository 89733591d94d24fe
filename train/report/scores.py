"""Scores with their spread: the same number of samples from several sets of seeds, as many as the time allows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from uni_instruct.data import Dataset
from uni_instruct.engine import Engine
from uni_instruct.evaluate import METRICS, Evaluator, frechet_distance
from uni_instruct.evaluate.class_draw import draw_classes
from uni_instruct.evaluate.sample_source import reference_class_ids
from uni_instruct.evaluate.scores import MIN_SAMPLES, Available, frechet_name, moments
from uni_instruct.generate import generate_batches
from uni_instruct.train.monitoring import scores as selection

SETS, BUDGET_S = 3, 40.0
MAX_SAMPLES_PER_SET = 5000  # of a set
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class SetScores:
    """Metric -> its value in each set; samples is the size of a set. notes are limits that a reader should know."""

    samples: int
    values: dict[str, list[float]]
    notes: tuple[str, ...] = ()

    @property
    def sets(self) -> int:
        """How many there are."""
        return max(map(len, self.values.values()), default=0)


def samples_of_a_set(wanted: int) -> int:
    """As many as the recipe evaluates with, as far as they are affordable: a Frechet distance depends on their number."""
    # A Frechet distance of N samples is too large by about 1/N: only those of as many compare.
    return max(MIN_SAMPLES, min(wanted, MAX_SAMPLES_PER_SET))


def score_sets(evaluator: Evaluator, engine: Engine, metric: str, samples: int, s_per_image: float | None) -> SetScores | None:
    """Scores of the engine's images of seeds 0.., set after set, while BUDGET_S lasts.

    s_per_image: how long an image is known to take; None where even a first set is sure to be affordable. None is returned
    where not a single set is.
    """
    if s_per_image is not None and s_per_image * samples > BUDGET_S:
        return None
    notes: list[str] = []

    def score(number: int) -> dict[str, float]:
        seeds = range(number * samples, (number + 1) * samples)
        drawn = draw_classes(engine.spec, seeds, evaluator.reference)
        class_ids = drawn.class_ids
        names = tuple(engine.spec.class_name(i) for i in range(engine.spec.num_classes))
        mapped, note = reference_class_ids(class_ids, names, evaluator.reference)
        asked = _asked(evaluator, metric, samples, mapped is not None)
        scores = evaluator.score_batches(generate_batches(engine, seeds, class_ids, BATCH), mapped, asked)
        notes.extend(n for n in (*scores.notes, note, drawn.note) if n and n not in notes)
        return scores.values

    sets = _while_affordable(score)
    return SetScores(samples=samples, values=_by_metric(sets), notes=tuple(notes))


def score_data(evaluator: Evaluator, metric: str, samples: int) -> SetScores | None:
    """What a perfect generator would score: training images drawn at random, with replacement. None where that is unknown."""
    if evaluator.features is None or metric != "FD":
        return None
    features, mu, sigma = evaluator.features.features, evaluator.mu, evaluator.sigma

    def score(number: int) -> dict[str, float]:
        drawn = np.random.default_rng(number).integers(len(features), size=samples)
        return {frechet_name(evaluator.extractor): frechet_distance(*moments(features[drawn]), mu, sigma)}

    accuracy = evaluator.extractor.heldout_accuracy
    known = {"class_accuracy": [accuracy]} if accuracy is not None else {}
    return SetScores(samples=samples, values=_by_metric(_while_affordable(score)) | known)


def _asked(evaluator: Evaluator, metric: str, samples: int, has_class_ids: bool) -> list[str]:
    reference = len(evaluator.reference)
    compared = ["pr"] if reference <= selection.MAX_REFERENCE_FOR_PR else []
    wanted = [selection.SELECTION_METRICS[metric].asked, "class_accuracy", *compared]
    means = Available(evaluator.extractor, samples, reference if isinstance(evaluator.reference, Dataset) else 0, has_class_ids)
    return [name for name in wanted if METRICS[name].missing(means) is None]


def _while_affordable(score: Callable[[int], dict[str, float]]) -> list[dict[str, float]]:
    """At least one set, and another while it is likely to end within the budget."""
    start, sets = time.monotonic(), list[dict[str, float]]()
    while not sets or (len(sets) < SETS and (time.monotonic() - start) * (len(sets) + 1) / len(sets) <= BUDGET_S):
        sets.append(score(len(sets)))
    return sets


def _by_metric(sets: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [values[name] for values in sets] for name in sets[0]}
