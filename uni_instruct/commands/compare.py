"""`uni-instruct compare`: whether one generator, or one recipe, scores better than another."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich_click as click

from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.evaluate.comparison import LEVEL, Difference, Trained, compare_recipes, compare_weights

# What must be alike, or two numbers have nothing to do with each other: where it stands in a result, and its name.
_ALIKE = (
    (("reference", "name"), "reference"),
    (("reference", "samples"), "number of reference images"),
    (("extractor", "sha256"), "extractor"),
    (("scores", "generator", "samples"), "number of images"),
    (("classes",), "draw of classes"),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--metric", help="As it is printed, such as FID or precision. [default: the Frechet distance]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def compare(a: str, b: str, metric: str | None, as_json: bool) -> None:
    """Say whether A is better or worse than B, or that it cannot be said.

    A and B are results of 'evaluate --json', or several with commas between them: one for each training of the same recipe.

    Example: uni-instruct compare a1.json,a2.json,a3.json b1.json,b2.json,b3.json
    """
    sides = [_results(side) for side in (a, b)]
    for result in [*sides[0], *sides[1]]:
        _check_alike(result, sides[0][0])
    name = metric or next(iter(sides[0][0].facts["scores"]["generator"]["values"]))
    trained = [[result.values(name) for result in side] for side in sides]
    differences = {"weights": compare_weights(name, *trained), "recipes": compare_recipes(name, *trained)}
    facts = {"metric": name, "level": LEVEL, "a": _means(trained[0]), "b": _means(trained[1])}
    facts |= {what: asdict(difference) for what, difference in differences.items()}
    click.echo(json.dumps(facts, indent=2)) if as_json else _print(facts, differences)


class _Result:
    """A result of `evaluate --json`."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise RequestError(f"there is no result {path}", remedy="write one: uni-instruct evaluate ... --json > FILE")
        try:
            self.facts: dict[str, Any] = json.loads(path.read_text())
            self.generator: dict[str, Any] = self.facts["scores"]["generator"]
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(
                f"{path} is no result of a generator", remedy="write one: uni-instruct evaluate BUNDLE ... --json > FILE"
            ) from error

    def values(self, name: str) -> Trained:
        """The metric's values by set. Raises RequestError where it was not measured."""
        sets = self.generator.get("by_set", [self.generator["values"]])
        if name not in sets[0]:
            known = ", ".join(sets[0])
            raise RequestError(f"{self.path} has no {name}", remedy=f"choose one of {known}", param="metric")
        return Trained(tuple(values[name] for values in sets))


def _results(text: str) -> list[_Result]:
    whole = Path(text).is_file()
    results = [_Result(Path(part)) for part in ([text] if whole else text.split(","))]
    weights = [result.generator.get("weights_sha256") for result in results]
    if len(set(weights)) < len(weights):
        raise RequestError(
            f"{text} has the same weights twice", remedy="give each training once; --sets scores one several times"
        )
    return results


def _check_alike(result: _Result, first: _Result) -> None:
    for place, what in _ALIKE:
        found = [_at(facts, place) for facts in (result.facts, first.facts)]
        if found[0] != found[1]:
            raise RequestError(
                f"{first.path} and {result.path} differ in their {what}: {str(found[1])[:40]} and {str(found[0])[:40]}",
                remedy="evaluate both alike",
            )


def _at(facts: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        facts = facts.get(name) if isinstance(facts, dict) else None
    return facts


def _means(side: list[Trained]) -> list[float]:
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
