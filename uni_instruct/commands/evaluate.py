"""`uni-instruct evaluate`: score generated images against a data set."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import rich_click as click

from uni_instruct.bundle import Bundle, is_bundle, is_run, shipped_generators
from uni_instruct.commands.evaluate_report import print_scores, score_facts
from uni_instruct.commands.worker_options import ray_option, worker_options_of, workers_option
from uni_instruct.data import Dataset, is_data, open_dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate import (
    EXTRACTORS,
    METRICS,
    PRETRAINED,
    Evaluator,
    Extractor,
    Scores,
    Statistics,
    open_reference,
    write_statistics,
)
from uni_instruct.evaluate.class_draw import DATA, UNIFORM, DrawnClasses, draw_classes
from uni_instruct.evaluate.evaluator import check_shape
from uni_instruct.evaluate.extractors import pretrained
from uni_instruct.evaluate.measure import measure
from uni_instruct.evaluate.sample_source import SampleSource, bundle_samples, dataset_samples
from uni_instruct.evaluate.scores import MIN_SAMPLES, PUBLISHED_SAMPLES, check_count, check_metrics
from uni_instruct.noise import parse_seeds
from uni_instruct.sampling.forms import check_finished
from uni_instruct.sampling.workers import WorkerOptions
from uni_instruct.system.progress import progress

BATCH = 64
# A larger number is assumed to be a typing error.
MAX_SAMPLES = 10_000_000
# By default QUICK_SETS sets of seeds are scored if one set has at most QUICK_VALUES pixel values (times steps), and enough
# images for a covariance that is not singular. Otherwise one set is scored.
QUICK_SETS, QUICK_VALUES, MIN_SAMPLES_OF_SETS = 3, 500_000, 1000


@click.command()
@click.argument("images", metavar="BUNDLE|IMAGES")
@click.option(
    "--reference", "reference_source", required=True, help="Data set, or a file of statistics (mu and sigma: .npz or .pkl)."
)
@click.option("--teacher", help="Teacher bundle to score on the same seeds, for the ratio of the distances.")
@click.option(
    "--steps",
    type=click.IntRange(2, 1000),
    help="Sampling steps of --teacher, or of BUNDLE if it is a teacher. N steps take 2N - 1 network evaluations. "
    "[default: the teacher's own]",
)
@click.option("--metrics", help=f"Some of {','.join(METRICS)}. [default: all that apply]")
@click.option(
    "--extractor",
    type=click.Choice([*EXTRACTORS, *PRETRAINED]),
    default="auto",
    help="Network whose features of the images are compared.",
)
@click.option(
    "--extractor-weights",
    type=click.Path(path_type=Path),
    help="File with the weights of CLIP or DINOv2. [default: from the caches of torch and CLIP]",
)
@click.option(
    "--samples",
    type=click.IntRange(MIN_SAMPLES, MAX_SAMPLES),
    help=f"How many images. [default: as many as the reference has, or {PUBLISHED_SAMPLES}]",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="First seed. [default: 0]")
@click.option("--seeds", "seeds_text", help="Exact seeds, in place of --seed and --samples, such as 0-4999.")
@click.option(
    "--sets",
    type=click.IntRange(1, 100),
    help="Number of disjoint sets of seeds, for mean and spread. Each has --samples images; --seeds is divided. "
    "[default: 3 if that is quick, else 1]",
)
@click.option(
    "--classes",
    type=click.Choice([UNIFORM, DATA]),
    help="How classes are drawn: uniformly, or with the frequencies of the reference (data). "
    "[default: data if the reference is unbalanced, else uniform]",
)
@click.option("--engine", help="Engine id of the bundle, or a runtime. [default: the fastest on this machine]")
@click.option(
    "--device", help="Device of the engine: cpu, cuda or cuda:1. [default: a GPU if the engine can use one, else the CPU]"
)
@click.option("--batch", type=click.IntRange(1, 4096), default=BATCH, help="Images at once.")
@workers_option
@ray_option
@click.option(
    "--save-statistics",
    type=click.Path(path_type=Path),
    help="Also write the reference's mu and sigma to this .npz, for later use as --reference.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(
    images: str,
    reference_source: str,
    teacher: str | None,
    steps: int | None,
    metrics: str | None,
    extractor: str,
    extractor_weights: Path | None,
    samples: int | None,
    seed: int | None,
    seeds_text: str | None,
    sets: int | None,
    classes: str | None,
    engine: str | None,
    device: str | None,
    batch: int,
    workers: int | None,
    ray_address: str | None,
    save_statistics: Path | None,
    as_json: bool,
) -> None:
    """Score a generator, or existing images (a folder, zip or npz), against a reference.

    Colour images of at least 32 pixels are compared with InceptionV3 (FID, KID, IS, precision, recall). Others are compared
    with a small classifier, which ships with the package or is trained once: its distances are named after it and not FID.

    Example: uni-instruct evaluate runs/digits/generator --reference digits --teacher runs/digits/teacher
    """
    # Checks come as early as possible, because the rest is slow: all of the reference is read, and it may train a classifier.
    names, worker_options, bundle = _names(metrics), worker_options_of(workers, ray_address, device), _bundle(images)
    _check_statistics_path(save_statistics)
    given = {"--teacher": teacher, "--steps": steps, "--seed": seed, "--seeds": seeds_text, "--classes": classes}
    _check_images_options(bundle, given | {"--engine": engine, "--device": device, "--sets": sets})
    bundles = _sampled_in(steps, bundle, Bundle.open(teacher) if teacher is not None else None)
    reference = open_reference(reference_source)
    count = _sets(sets, seeds_text, samples, bundle, reference)
    seeds = choose_seeds(seeds_text, seed, samples, reference, count)
    drawn = draw_classes(bundle.spec, seeds, reference, classes) if bundle else DrawnClasses(None, "")
    made = _bundle_sources(bundles, seeds, engine, device, batch, reference, drawn)
    sources = made or {"images": dataset_samples(_open_images(images), samples, batch, reference, images)}
    evaluator = _evaluator(reference, _opened_extractor(extractor, extractor_weights), sources, names, count)
    _save_statistics(evaluator, save_statistics)
    scores = {role: _score(evaluator, role, source.parts(count), names, worker_options) for role, source in sources.items()}
    facts = score_facts(evaluator, sources, scores, seeds_text_of(seeds) if bundle else None, drawn)
    click.echo(json.dumps(facts, indent=2)) if as_json else print_scores(facts)


def _bundle(images: str) -> Bundle | None:
    return Bundle.open(images) if is_bundle(images) or is_run(images) else None


def _sampled_in(steps: int | None, bundle: Bundle | None, teacher: Bundle | None) -> dict[str, Bundle]:
    """The bundles by role. `steps` applies to the teacher: to the last bundle, which may be the only one."""
    found = {role: each for role, each in (("generator", bundle), ("teacher", teacher)) if each is not None}
    if steps is not None and found:
        last = list(found)[-1]
        found[last] = found[last].with_steps(steps)
    return found


def _names(metrics: str | None) -> list[str] | None:
    return check_metrics(metrics.split(",")) if metrics is not None else None


def _score(
    evaluator: Evaluator, role: str, sets: list[SampleSource], metrics: list[str] | None, worker_options: WorkerOptions
) -> list[Scores]:
    return measure(evaluator, sets, metrics, worker_options, progress, f"score {role}")


def _save_statistics(evaluator: Evaluator, path: Path | None) -> None:
    if path is not None:
        write_statistics(evaluator.statistics(), path)


def _bundle_sources(
    bundles: Mapping[str, Bundle],
    seeds: list[int],
    engine: str | None,
    device: str | None,
    batch: int,
    reference: Dataset | Statistics,
    drawn: DrawnClasses,
) -> dict[str, SampleSource]:
    sources = {}
    for role, bundle in bundles.items():
        if role == "generator":
            sources[role] = bundle_samples(bundle, seeds, engine, batch, reference, drawn.class_ids, device)
        else:
            sources[role] = _teacher_samples(bundle, seeds, batch, reference, drawn.how, device)
    return sources


def _teacher_samples(
    teacher: Bundle, seeds: list[int], batch: int, reference: Dataset | Statistics, how: str, device: str | None
) -> SampleSource:
    # The same seeds and classes as the generator's, so that chance does not affect the ratio of their distances.
    drawn = draw_classes(teacher.spec, seeds, reference, how if how and teacher.spec.num_classes else None)
    return bundle_samples(teacher, seeds, None, batch, reference, drawn.class_ids, device)


def _evaluator(
    reference: Dataset | Statistics,
    extractor: str | Extractor,
    sources: dict[str, SampleSource],
    metrics: list[str] | None,
    sets: int,
) -> Evaluator:
    """The evaluator. Raises RequestError, before any image is made, if the sources cannot be scored."""
    for source in sources.values():
        if isinstance(reference, Dataset):
            check_shape(source.image_shape, reference.image_shape)
    evaluator = Evaluator(reference, extractor, progress)
    for source in sources.values():
        evaluator.check(metrics, source.count // sets, source.expected is not None)
    return evaluator


def _opened_extractor(name: str, weights: Path | None) -> str | Extractor:
    if weights is None:
        return name
    if name not in PRETRAINED:
        raise RequestError(
            f"--extractor-weights does not apply to extractor '{name}'",
            remedy=f"leave --extractor-weights out, or use --extractor with one of {', '.join(PRETRAINED)}",
            param="extractor_weights",
        )
    return pretrained(name, weights)


def _open_images(images: str) -> Dataset:
    if not is_data(images):
        check_finished(Path(images))
        raise RequestError(
            f"there is no bundle and there are no images at {images}",
            remedy="give a folder that 'train' wrote, a folder, zip or npz of images, or a shipped generator: "
            f"{', '.join(shipped_generators()) or 'none'}",
            param="images",
        )
    return open_dataset(images)


def _check_images_options(bundle: Bundle | None, options: Mapping[str, object]) -> None:
    """Raise RequestError for an option that applies to bundles only, if images were given."""
    given = next((name for name, value in options.items() if value is not None), None)
    if given and bundle is None:
        raise RequestError(f"{given} applies to bundles only, but images were given", remedy=f"leave {given} out", param=given)


def _check_statistics_path(path: Path | None) -> None:
    if path is not None and path.suffix.lower() != ".npz":
        raise RequestError(
            f"--save-statistics {path} is not the name of an .npz",
            remedy="give a file such as statistics.npz",
            param="save_statistics",
        )


def _sets(
    wanted: int | None, seeds: str | None, samples: int | None, bundle: Bundle | None, reference: Dataset | Statistics
) -> int:
    """The number of sets of seeds: `wanted`, or by default several if the images take seconds, else one."""
    if wanted is not None or bundle is None or seeds is not None:
        return wanted or 1
    count = samples or len(reference) or PUBLISHED_SAMPLES
    cost = count * math.prod(bundle.spec.image_shape) * bundle.spec.steps
    return QUICK_SETS if count >= MIN_SAMPLES_OF_SETS and cost <= QUICK_VALUES else 1


def choose_seeds(
    text: str | None, first: int | None, samples: int | None, reference: Dataset | Statistics, sets: int
) -> list[int]:
    """The seeds of all sets, in order. Raises RequestError if they cannot be divided into `sets` equal and disjoint sets."""
    if text is not None:
        if first is not None or samples is not None:
            raise RequestError("--seeds already says which and how many", remedy="leave --seed and --samples out")
        seeds = parse_seeds(text)
        if len(seeds) % sets or len(seeds) < sets:
            raise RequestError(
                f"{len(seeds)} seeds cannot be divided into {sets} equal sets", remedy="give a multiple of --sets", param="sets"
            )
        if sets > 1 and len(set(seeds)) < len(seeds):
            raise RequestError(
                "a seed is repeated, so the sets of seeds are not disjoint", remedy="give each seed once", param="seeds"
            )
        check_count(len(seeds) // sets)  # before the reference's features are computed, which may take minutes
        return seeds
    # By default as many images as the reference has, or as publications use: a Frechet distance depends on their number.
    start, count = first or 0, samples or len(reference) or PUBLISHED_SAMPLES
    return parse_seeds(f"{start}-{start + count * sets - 1}")


def seeds_text_of(seeds: list[int]) -> str:
    """The seeds for the report: '0-1796' if they are consecutive, else their number and range."""
    consecutive = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]}-{seeds[-1]}" if consecutive else f"{len(seeds)} from {min(seeds)} to {max(seeds)}"
