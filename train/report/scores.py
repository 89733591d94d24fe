"""Scores with their spread: several sets of samples of equal size, each from other seeds, as many as the time allows."""

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
MAX_SAMPLES_PER_SET = 5000  # keeps a set affordable, even if the recipe evaluates with more
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class SetScores:
    """Metric -> its value in each set. samples: size of a set. notes: limits of the scores that a reader should know."""

    samples: int
    values: dict[str, list[float]]
    notes: tuple[str, ...] = ()

    @property
    def sets(self) -> int:
        """Number of sets."""
        return max(map(len, self.values.values()), default=0)


def samples_of_a_set(wanted: int) -> int:
    """The size of a set: the recipe's number of samples for evaluation, but at most MAX_SAMPLES_PER_SET."""
    # The bias of a Frechet distance of N samples is positive and proportional to 1/N. Only equal N can be compared.
    return max(MIN_SAMPLES, min(wanted, MAX_SAMPLES_PER_SET))


def score_sets(evaluator: Evaluator, engine: Engine, metric: str, samples: int, s_per_image: float | None) -> SetScores | None:
    """Scores of the engine's images of seeds from 0 on, in up to SETS sets within BUDGET_S seconds.

    s_per_image: known time per image. Returns None if it shows that even one set exceeds the budget. Pass None to score at
    least one set in any case.
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
    """Scores that a perfect generator would reach: those of training images drawn at random with replacement.

    None if the metric is not FD, or if the evaluator has no features of the training images.
    """
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
    compared = ["pr"] if selection.affords_pr(reference) else []
    wanted = [selection.SELECTION_METRICS[metric].asked, "class_accuracy", *compared]
    means = Available(evaluator.extractor, samples, reference if isinstance(evaluator.reference, Dataset) else 0, has_class_ids)
    return [name for name in wanted if METRICS[name].missing(means) is None]


def _while_affordable(score: Callable[[int], dict[str, float]]) -> list[dict[str, float]]:
    """Score one set, then more (up to SETS) while the next one will probably end within BUDGET_S."""
    # elapsed (n + 1) / n predicts the time after n + 1 sets.
    start, sets = time.monotonic(), list[dict[str, float]]()
    while not sets or (len(sets) < SETS and (time.monotonic() - start) * (len(sets) + 1) / len(sets) <= BUDGET_S):
        sets.append(score(len(sets)))
    return sets


def _by_metric(sets: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [values[name] for values in sets] for name in sets[0]}
