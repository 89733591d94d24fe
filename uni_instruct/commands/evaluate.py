"""`uni-instruct evaluate`: how far generated images are from a data set."""

import json
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import rich_click as click

from uni_instruct import __version__
from uni_instruct.bundle import Bundle, is_bundle, shipped_generators
from uni_instruct.data import Dataset, is_data, open_dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate import EXTRACTORS, METRICS, Evaluator, Scores, Statistics, open_reference, write_statistics
from uni_instruct.evaluate.class_draw import DATA, UNIFORM, DrawnClasses, draw_classes
from uni_instruct.evaluate.evaluator import check_shape
from uni_instruct.evaluate.sample_source import SampleSource, bundle_samples, dataset_samples
from uni_instruct.evaluate.scores import MIN_SAMPLES, PUBLISHED_SAMPLES, check_count, check_metrics, frechet_name
from uni_instruct.noise import parse_seeds
from uni_instruct.progress import progress

BATCH = 64
# A larger number is taken for a slip of the keys.
MAX_SAMPLES = 10_000_000


@click.command()
@click.argument("images", metavar="BUNDLE|IMAGES")
@click.option("--reference", "reference_source", required=True, help="Data set, or .npz or .pkl of mu and sigma.")
@click.option("--teacher", help="Bundle that is scored on the same seeds, for the ratio of the distances.")
@click.option("--metrics", help=f"Some of {','.join(METRICS)}. [default: all that apply]")
@click.option("--extractor", type=click.Choice(EXTRACTORS), default="auto", help="What turns images into features.")
@click.option(
    "--samples",
    type=click.IntRange(MIN_SAMPLES, MAX_SAMPLES),
    help=f"How many images. [default: as many as the reference has, or {PUBLISHED_SAMPLES}]",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="First seed. [default: 0]")
@click.option("--seeds", "seeds_text", help="All seeds instead, such as 0-4999.")
@click.option(
    "--classes",
    type=click.Choice([UNIFORM, DATA]),
    help="How often the seeds draw each class: all alike, or as in the reference. [default: data where it is unbalanced]",
)
@click.option("--engine", help="Engine id of the bundle, or a runtime. [default: the fastest here]")
@click.option("--device", help="Where the engine runs: cpu, cuda or cuda:1. [default: a GPU where it can use one]")
@click.option("--batch", type=click.IntRange(1, 4096), default=BATCH, help="Images at once.")
@click.option(
    "--save-statistics",
    type=click.Path(path_type=Path),
    help="Also write the reference's mu and sigma to this .npz, a --reference for later.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def evaluate(
    images: str,
    reference_source: str,
    teacher: str | None,
    metrics: str | None,
    extractor: str,
    samples: int | None,
    seed: int | None,
    seeds_text: str | None,
    classes: str | None,
    engine: str | None,
    device: str | None,
    batch: int,
    save_statistics: Path | None,
    as_json: bool,
) -> None:
    """Score a generator, or images that are there (a folder, zip or npz), against a reference.

    Colour images from 32 pixels on are compared by InceptionV3 (FID, KID, IS, precision, recall). For others a small classifier
    is trained on the reference once; its distances are named after it and are no FID.

    Example: uni-instruct evaluate runs/digits/generator --reference digits --teacher runs/digits/teacher
    """
    # Whatever can be wrong is refused before anything long begins: the reference is read whole, and may train a classifier.
    names = check_metrics(metrics.split(",")) if metrics is not None else None
    _check_statistics_path(save_statistics)
    bundle = Bundle.open(images) if is_bundle(images) else None
    if bundle is None:
        options = {"--teacher": teacher, "--seed": seed, "--seeds": seeds_text, "--classes": classes}
        _check_images_options(options | {"--engine": engine, "--device": device})
    reference = open_reference(reference_source)
    seeds = _seeds(seeds_text, seed, samples, reference)
    drawn = draw_classes(bundle.spec, seeds, reference, classes) if bundle else DrawnClasses(None, "")
    if bundle is None:
        sources = {"images": dataset_samples(_open_images(images), samples, batch, reference)}
    else:
        sources = {"generator": bundle_samples(bundle, seeds, engine, batch, reference, drawn.class_ids, device)}
        if teacher is not None:
            sources["teacher"] = _teacher_samples(Bundle.open(teacher), seeds, batch, reference, drawn.how, device)
    evaluator = _evaluator(reference, extractor, sources, names)
    if save_statistics is not None:
        write_statistics(evaluator.statistics(), save_statistics)
    scores = {role: _score(evaluator, role, source, names) for role, source in sources.items()}
    facts = _facts(evaluator, sources, scores, _seeds_text(seeds) if bundle else None, drawn)
    click.echo(json.dumps(facts, indent=2)) if as_json else _print(facts)


def _teacher_samples(
    teacher: Bundle, seeds: list[int], batch: int, reference: Dataset | Statistics, how: str, device: str | None
) -> SampleSource:
    # Seeds and classes as the generator's, so that the ratio of their distances does not depend on luck.
    drawn = draw_classes(teacher.spec, seeds, reference, how if how and teacher.spec.num_classes else None)
    return bundle_samples(teacher, seeds, None, batch, reference, drawn.class_ids, device)


def _evaluator(
    reference: Dataset | Statistics, extractor: str, sources: dict[str, SampleSource], metrics: list[str] | None
) -> Evaluator:
    """The evaluator. Raises RequestError for whatever would make the sources' scores impossible, before any image is made."""
    for source in sources.values():
        if isinstance(reference, Dataset):
            check_shape(source.image_shape, reference.image_shape)
    evaluator = Evaluator(reference, extractor, progress)
    for source in sources.values():
        evaluator.check(metrics, source.count, source.class_ids is not None)
    return evaluator


def _open_images(images: str) -> Dataset:
    if not is_data(images):
        raise RequestError(
            f"there is no bundle and there are no images at {images}",
            remedy="give a folder that 'train' wrote, a folder, zip or npz of images, or a shipped generator: "
            f"{', '.join(shipped_generators()) or 'none'}",
            param="images",
        )
    return open_dataset(images)


def _check_images_options(options: Mapping[str, object]) -> None:
    """Raises RequestError for an option that only a bundle can follow."""
    given = next((name for name, value in options.items() if value is not None), None)
    if given:
        raise RequestError(f"{given} needs a bundle, and images were given", remedy=f"leave {given} out", param=given)


def _check_statistics_path(path: Path | None) -> None:
    if path is not None and path.suffix.lower() != ".npz":
        raise RequestError(
            f"--save-statistics {path} is not the name of an .npz",
            remedy="give a file such as statistics.npz",
            param="save_statistics",
        )


def _seeds(text: str | None, first: int | None, samples: int | None, reference: Dataset | Statistics) -> list[int]:
    if text is not None:
        if first is not None or samples is not None:
            raise RequestError("--seeds already says which and how many", remedy="leave --seed and --samples out")
        seeds = parse_seeds(text)
        check_count(len(seeds))  # before features of a reference are made, which may take minutes
        return seeds
    # By default as many as the reference has, or as publications use: a Frechet distance depends on the number of images.
    start, count = first or 0, samples or len(reference) or PUBLISHED_SAMPLES
    return parse_seeds(f"{start}-{start + count - 1}")


def _seeds_text(seeds: list[int]) -> str:
    """'0-1796' where the seeds are consecutive, else how many there are."""
    consecutive = seeds == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]}-{seeds[-1]}" if consecutive else f"{len(seeds)} from {min(seeds)} to {max(seeds)}"


def _score(evaluator: Evaluator, role: str, source: SampleSource, metrics: list[str] | None) -> Scores:
    with progress(f"score {role}", source.count, "images") as bar:

        def with_progress() -> Iterator[np.ndarray]:
            for batch in source.batches():
                yield batch
                bar.advance(len(batch))

        return evaluator.score_batches(with_progress(), source.class_ids, metrics)


def _facts(
    evaluator: Evaluator,
    sources: dict[str, SampleSource],
    scores: dict[str, Scores],
    seeds: str | None,
    drawn: DrawnClasses,
) -> dict[str, Any]:
    extractor, reference = evaluator.extractor, evaluator.reference
    notes = [drawn.note, reference.note if isinstance(reference, Dataset) else ""]
    notes += [note for role in sources for note in (*scores[role].notes, sources[role].note) if note]
    return {
        "reference": {"name": reference.name, "samples": len(reference)},
        "extractor": {
            "name": extractor.name,
            "sha256": extractor.sha256,
            "heldout_accuracy": extractor.heldout_accuracy,
        },
        "seeds": seeds,
        "classes": drawn.how or None,
        "scores": {
            role: {
                "source": source.source,
                "engine": source.engine or None,
                "weights_sha256": source.weights_sha256 or None,
                "samples": source.count,
                "values": scores[role].values,
            }
            for role, source in sources.items()
        },
        "distance_to_teacher_ratio": _ratio(scores, frechet_name(extractor)),
        "notes": list(dict.fromkeys(filter(None, notes))),
        "versions": {"uni-instruct": __version__}
        | {package: version(package) for package in ("torch", "torch-fidelity", "numpy")},
    }


def _ratio(scores: dict[str, Scores], distance: str) -> float | None:
    """The generator's Frechet distance over its teacher's; None where either was not measured."""
    # A distance alone says little; beside the teacher's it says how much the distillation lost.
    values = [scores[role].values.get(distance) for role in ("generator", "teacher") if role in scores]
    if len(values) < 2 or values[0] is None or not values[1]:
        return None
    return values[0] / values[1]


def _print(facts: dict[str, Any]) -> None:
    roles: dict[str, Any] = facts["scores"]
    for role, score in roles.items():
        classes = f", classes {facts['classes']}" if facts["classes"] else ""
        made_by = f" on {score['engine']}, seeds {facts['seeds']}{classes}" if score["engine"] else ""
        click.echo(f"{role}: {score['samples']} images of {score['source']}{made_by}")
    reference, extractor = facts["reference"], facts["extractor"]
    size = f", {reference['samples']} images" if reference["samples"] else ""
    click.echo(f"reference: {reference['name']}{size}")
    accuracy = extractor["heldout_accuracy"]
    skill = "" if accuracy is None else f", right on {accuracy:.1%} of held-out images"
    click.echo(f"extractor: {extractor['name']}{skill}, sha256 {extractor['sha256'][:16]}")
    # A table for eyes, lines for grep.
    (_print_table if sys.stdout.isatty() else _print_lines)(roles)
    if facts["distance_to_teacher_ratio"] is not None:
        click.echo(f"distance to the reference: {facts['distance_to_teacher_ratio']:.2f} times the teacher's")
    for note in facts["notes"]:
        click.echo(f"note: {note}")


def _print_table(roles: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", *roles)
    for name in next(iter(roles.values()))["values"]:
        table.add_row(name, *(f"{score['values'][name]:.4g}" if name in score["values"] else "" for score in roles.values()))
    Console().print(table)


def _print_lines(roles: dict[str, Any]) -> None:
    for role, score in roles.items():
        for name, value in score["values"].items():
            click.echo(f"{role} {name}: {value:.4g}")
