"""Score several bundles in the same way: one reference, one extractor, the same seeds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from uni_instruct.bundle import Bundle
from uni_instruct.commands.evaluate import choose_seeds, seeds_text_of
from uni_instruct.commands.evaluate_report import score_facts
from uni_instruct.data import Dataset
from uni_instruct.evaluate import Evaluator, open_reference
from uni_instruct.evaluate.class_draw import draw_classes
from uni_instruct.evaluate.evaluator import check_shape
from uni_instruct.evaluate.measure import measure
from uni_instruct.evaluate.result import EvaluationResult
from uni_instruct.evaluate.sample_source import bundle_samples
from uni_instruct.evaluate.scores import check_count
from uni_instruct.sampling.workers import WorkerOptions
from uni_instruct.system.progress import progress

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How bundles are scored. Each field corresponds to the option of `evaluate` with that name."""

    reference: str
    sets: int
    samples: int | None = None
    seed: int | None = None
    extractor: str = "auto"
    engine: str | None = None
    device: str | None = None
    workers: WorkerOptions = field(default_factory=WorkerOptions)


def score_bundles(bundles: Sequence[Bundle], scoring: Scoring, metrics: Sequence[str] | None) -> list[EvaluationResult]:
    """Score each bundle; the results are those of `evaluate --json`. metrics: names from METRICS, None for all that apply.

    Raises RequestError, before any image is made, if a bundle does not fit the reference or a metric cannot be measured.
    """
    reference = open_reference(scoring.reference)
    seeds = choose_seeds(None, scoring.seed, scoring.samples, reference, scoring.sets)
    check_count(len(seeds) // scoring.sets)
    drawn = [draw_classes(bundle.spec, seeds, reference) for bundle in bundles]
    sources = [
        bundle_samples(bundle, seeds, scoring.engine, BATCH, reference, draw.class_ids, scoring.device)
        for bundle, draw in zip(bundles, drawn, strict=True)
    ]
    if isinstance(reference, Dataset):
        for source in sources:
            check_shape(source.image_shape, reference.image_shape)
    evaluator = Evaluator(reference, scoring.extractor, progress)
    for source in sources:
        evaluator.check(metrics, source.count // scoring.sets, source.expected is not None)
    found: list[EvaluationResult] = []
    for source, draw in zip(sources, drawn, strict=True):
        scores = measure(evaluator, source.parts(scoring.sets), metrics, scoring.workers, progress, f"score {source.source}")
        found.append(score_facts(evaluator, {"generator": source}, {"generator": scores}, seeds_text_of(seeds), draw))
    return found
