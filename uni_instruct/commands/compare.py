"""`uni-instruct compare`: decide whether one generator, or one recipe, scores better than another."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich_click as click

from uni_instruct.bundle import Bundle, is_bundle
from uni_instruct.commands.evaluate import MAX_SAMPLES
from uni_instruct.commands.scoring import Scoring, score_bundles
from uni_instruct.commands.worker_options import ray_option, worker_options_of, workers_option
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.evaluate import EXTRACTORS, METRICS, PRETRAINED
from uni_instruct.evaluate.comparison import (
    LEVEL,
    RETRAINING_TO_RESAMPLING,
    Difference,
    TrainingScores,
    compare_recipes,
    compare_weights,
)
from uni_instruct.evaluate.result import RoleScores, parse_result
from uni_instruct.evaluate.scores import MIN_SAMPLES, metric_key
from uni_instruct.system.files import JSON_ERRORS

# Sets of seeds for each bundle: the fewest that give a useful estimate of the spread.
SETS = 3

_CLASSES = ("classes",)
# What must be equal in two results, or their scores are not comparable: its place in a result, its name, and its option.
_MUST_MATCH = (
    (("reference", "name"), "reference", "--reference"),
    (("reference", "samples"), "number of reference images", "--reference"),
    (("extractor", "sha256"), "extractor", "--extractor"),
    (("scores", "generator", "samples"), "number of images", "--samples"),
    (_CLASSES, "draw of classes", "--classes"),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--metric", help="Name of the metric as evaluate prints it, such as FID or precision. [default: the Frechet distance]"
)
@click.option("--reference", help="Data set or statistics that bundles are scored against.")
@click.option("--sets", type=click.IntRange(1, 100), help=f"Disjoint sets of seeds for each bundle. [default: {SETS}]")
@click.option(
    "--samples",
    type=click.IntRange(MIN_SAMPLES, MAX_SAMPLES),
    help="Images in each set. [default: as many as the reference has]",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="First seed. [default: 0]")
@click.option(
    "--extractor",
    type=click.Choice([*EXTRACTORS, *PRETRAINED]),
    help="Network whose features of the images are compared. [default: auto]",
)
@click.option("--engine", help="Engine id of the bundles, or a runtime. [default: the fastest on this machine]")
@click.option(
    "--device", help="Device of the engines: cpu, cuda or cuda:1. [default: a GPU if the engine can use one, else the CPU]"
)
@workers_option
@ray_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def compare(a: str, b: str, metric: str | None, as_json: bool, **scoring: Any) -> None:
    """Decide whether A is better or worse than B, or that the difference is inconclusive.

    A and B are bundles or runs, which are scored here against --reference, or result files of 'evaluate --json'. To compare
    recipes, give several of them separated by commas, one for each training of the recipe.

    Example: uni-instruct compare runs/a1,runs/a2,runs/a3 runs/b1,runs/b2,runs/b3 --reference digits
    """
    sides = _opened(a, b, metric, scoring)
    for result in [*sides[0], *sides[1]]:
        _check_comparable(result, sides[0][0])
    name = sides[0][0].name_of(metric)
    trained = [[result.values(name) for result in side] for side in sides]
    differences = {"weights": compare_weights(name, *trained), "recipes": compare_recipes(name, *trained)}
    facts = {"metric": name, "level": LEVEL, "a": _means(trained[0]), "b": _means(trained[1])}
    facts |= {what: asdict(difference) for what, difference in differences.items()}
    facts["note"] = "; ".join(filter(None, (_note(trained), _note_of_classes([*sides[0], *sides[1]])))) or None
    click.echo(json.dumps(facts, indent=2)) if as_json else _print(facts, differences)


class _Result:
    """A result of `evaluate --json`. source: its file, or the bundle that was scored."""

    def __init__(self, source: str, facts: Any):
        self.source = source
        try:
            self.facts = parse_result(facts)
        except ValueError as error:
            raise _no_result(source, error) from error
        self.generator: RoleScores = self.facts["scores"]["generator"]
        self.sets: list[dict[str, float]] = self.generator.get("by_set", [self.generator["values"]])

    def name_of(self, metric: str | None) -> str:
        """The full name in this result of a metric that is given by full name or key; by default the first, the distance."""
        known = list(self.sets[0])
        if metric is None:
            return known[0]
        if metric in METRICS:
            return next((name for name in known if metric_key(name) == metric), metric)
        wanted = metric.casefold()  # FD is enough for FD(digits-classifier)
        return next((name for name in known if wanted in (name.casefold(), name.partition("(")[0].casefold())), metric)

    def values(self, name: str) -> TrainingScores:
        """The metric's values, one for each set of seeds. Raises RequestError if it was not measured."""
        if name not in self.sets[0]:
            known = ", ".join(self.sets[0])
            raise RequestError(f"{self.source} has no {name}", remedy=f"choose one of {known}", param="metric")
        values = tuple(values[name] for values in self.sets)
        if not all(map(math.isfinite, values)):
            raise RequestError(
                f"{self.source} has {name} {', '.join(map(str, values))}, which cannot be compared",
                remedy="evaluate it with more --samples, or choose another --metric",
                param="metric",
            )
        return TrainingScores(values)


def _opened(a: str, b: str, metric: str | None, scoring: Mapping[str, Any]) -> list[list[_Result]]:
    """The results of both sides: read from files, or measured for bundles, all with the same evaluator."""
    names = [[text] if Path(text).exists() else text.split(",") for text in (a, b)]
    bundles = {name: Bundle.open(found) for name in names[0] + names[1] if (found := _bundle_at(name)) is not None}
    results = {name: _read(name) for name in names[0] + names[1] if name not in bundles}
    weights = {name: bundle.weights_sha256 for name, bundle in bundles.items()}
    weights |= {name: result.generator.get("weights_sha256") or name for name, result in results.items()}
    for text, side in zip((a, b), names, strict=True):
        _check_trainings(text, [weights[name] for name in side])
    options = {option: value for option, value in scoring.items() if value is not None}
    if bundles:
        results |= _scored(bundles, metric, options)
    elif options:
        first = next(iter(options))
        option = first.removesuffix("_address")
        raise RequestError(f"--{option} applies to bundles only, but results were given", remedy="leave it out", param=first)
    return [[results[name] for name in side] for side in names]


def _bundle_at(name: str) -> str | Path | None:
    """The bundle at this name; for the folder of a run, its generator; None if it is not a bundle or a folder."""
    of_run = Path(name) / "generator"
    if is_bundle(of_run) and not is_bundle(name):
        return of_run
    return name if is_bundle(name) or Path(name).is_dir() else None


def _scored(bundles: Mapping[str, Bundle], metric: str | None, options: dict[str, Any]) -> dict[str, _Result]:
    if "reference" not in options:
        raise RequestError("bundles are scored against a reference", remedy="give --reference DATA", param="reference")
    key = metric_key("fd" if metric is None else metric)  # an unknown metric is refused before anything is scored
    workers = worker_options_of(options.pop("workers", None), options.pop("ray_address", None), options.get("device"))
    scoring = Scoring(**{"sets": SETS} | options, workers=workers)
    found = score_bundles(list(bundles.values()), scoring, [key])
    return {name: _Result(name, facts) for name, facts in zip(bundles, found, strict=True)}


def _read(name: str) -> _Result:
    if not Path(name).is_file():
        raise RequestError(
            f"there is no result or bundle {name}", remedy="write one: uni-instruct evaluate ... --json > FILE", param="a"
        )
    try:
        facts = json.loads(Path(name).read_text())
    except JSON_ERRORS as error:
        raise _no_result(name, error) from error
    return _Result(name, facts)


def _no_result(name: str, error: Exception) -> FileFormatError:
    return FileFormatError(
        f"{name} is not a result of a generator ({error})", remedy="write one: uni-instruct evaluate BUNDLE ... --json > FILE"
    )


def _check_trainings(text: str, weights: Sequence[str]) -> None:
    if len(set(weights)) < len(weights):
        raise RequestError(
            f"{text} contains the same weights twice",
            remedy="give each training once; --sets scores one training several times",
        )


def _note(trained: Sequence[Sequence[TrainingScores]]) -> str | None:
    """A note on what a single training can tell; None if both sides have several trainings."""
    if all(len(side) > 1 for side in trained):
        return None
    return (
        f"training again changes FID about {RETRAINING_TO_RESAMPLING} times as much as other seeds do (arXiv 2606.20536): "
        "give several trainings of either side to compare recipes"
    )


def _note_of_classes(results: Sequence[_Result]) -> str | None:
    """A note if one draws its classes uniformly and another has none: on unbalanced data this decides, not the generators."""
    if {_at(result.facts, _CLASSES) for result in results} != {None, "uniform"}:
        return None
    return "some draw their classes uniformly, and some have no classes: fair only if the reference is balanced"


def _check_comparable(result: _Result, first: _Result) -> None:
    for place, what, option in _MUST_MATCH:
        found = [_at(facts, place) for facts in (result.facts, first.facts)]
        # A generator without classes draws none: it is compared with one that has them, and what that means is said.
        if found[0] != found[1] and not (place == _CLASSES and None in found):
            raise RequestError(
                f"{first.source} and {result.source} differ in their {what}: {str(found[1])[:40]} and {str(found[0])[:40]}",
                remedy=f"evaluate both with the same {option}",
            )


def _at(facts: object, place: tuple[str, ...]) -> object:
    for name in place:
        facts = facts.get(name) if isinstance(facts, dict) else None
    return facts


def _means(side: list[TrainingScores]) -> list[float]:
    return [run.mean for run in side]


def _print(facts: dict[str, Any], differences: dict[str, Difference]) -> None:
    for side in ("a", "b"):
        means = ", ".join(f"{value:.4g}" for value in facts[side])
        click.echo(f"{side.upper()}: {facts['metric']} {means}, {len(facts[side])} training{'s' * (len(facts[side]) > 1)}")
    for what, found in differences.items():
        subject = "these weights" if what == "weights" else "the recipes"
        interval = f", {LEVEL:.0%} interval {found.interval[0]:+.4g} to {found.interval[1]:+.4g}" if found.interval else ""
        verdict = found.verdict if found.verdict == "inconclusive" else f"A is {found.verdict}"
        click.echo(f"{subject}: {verdict} (difference {found.difference:+.4g}{interval}; varied: {found.basis})")
    if facts["note"]:
        click.echo(f"note: {facts['note']}")
