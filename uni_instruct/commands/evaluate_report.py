"""The output of `evaluate`: scores, and what they depend on."""

import sys
from collections.abc import Sequence
from importlib.metadata import version
from statistics import mean, stdev

import rich_click as click

from uni_instruct import __version__
from uni_instruct.data import Dataset
from uni_instruct.evaluate import Evaluator, Scores
from uni_instruct.evaluate.class_draw import DrawnClasses
from uni_instruct.evaluate.result import EvaluationResult, RoleScores
from uni_instruct.evaluate.sample_source import SampleSource
from uni_instruct.evaluate.scores import frechet_name
from uni_instruct.spec import evaluations


def score_facts(
    evaluator: Evaluator,
    sources: dict[str, SampleSource],
    scores: dict[str, list[Scores]],
    seeds: str | None,
    drawn: DrawnClasses,
) -> EvaluationResult:
    """The result for `--json`. scores: for each role, one Scores for each set of seeds."""
    extractor, reference = evaluator.extractor, evaluator.reference
    # The reference's note begins with its name, since the images may have a similar note.
    of_reference = f"{reference.name}: {reference.note}" if isinstance(reference, Dataset) and reference.note else ""
    notes = [drawn.note, of_reference]
    notes += [note for role in sources for note in (*scores[role][0].notes, sources[role].note) if note]
    sets = len(scores[next(iter(sources))])
    if seeds is not None and sets == 1:
        notes.append("the spread over seeds is unknown with one set: --sets 3 measures it")
    return {
        "reference": {"name": reference.name, "samples": len(reference)},
        "extractor": {
            "name": extractor.name,
            "sha256": extractor.sha256,
            "heldout_accuracy": extractor.heldout_accuracy,
            "resizing": extractor.resizing or None,
        },
        "seeds": seeds,
        "sets": sets,
        "classes": drawn.how or None,
        "scores": {role: over_sets(scores[role], source, source.count // sets) for role, source in sources.items()},
        "distance_to_teacher_ratio": _ratio(scores, frechet_name(extractor)),
        "notes": list(dict.fromkeys(filter(None, notes))),
        "versions": {"uni-instruct": __version__}
        | {package: version(package) for package in ("torch", "torch-fidelity", "numpy")},
    }


def over_sets(scores: Sequence[Scores], source: SampleSource, samples: int) -> RoleScores:
    """The means over sets of seeds. For several sets also standard deviations (divided by n - 1), all values, and minima.

    samples: the number of images in a set.
    """
    by_set = [score.values for score in scores]
    columns = {name: [values[name] for values in by_set] for name in by_set[0]}
    found: RoleScores = {
        "source": source.source,
        "engine": source.engine or None,
        "weights_sha256": source.weights_sha256 or None,
        "steps": source.steps or None,
        "samples": samples,
        "values": {name: mean(column) for name, column in columns.items()} if len(scores) > 1 else by_set[0],
    }
    if len(scores) > 1:
        found["spread"] = {name: stdev(column) for name, column in columns.items()}
        found["by_set"] = by_set
        found["least"] = {name: min(column) for name, column in columns.items()}
    return found


def _ratio(scores: dict[str, list[Scores]], distance: str) -> float | None:
    """The generator's Frechet distance divided by its teacher's; None if one was not measured or the teacher's is 0."""
    # A distance alone says little. Compared with the teacher's it shows how much quality the distillation lost.
    roles = [scores[role] for role in ("generator", "teacher") if role in scores]
    if len(roles) < 2 or any(distance not in score.values for role in roles for score in role):
        return None
    values = [mean(score.values[distance] for score in role) for role in roles]
    if not values[1]:
        return None
    return values[0] / values[1]


def print_scores(facts: EvaluationResult) -> None:
    """Print the result: scores as a table on a terminal, otherwise as lines."""
    roles = facts["scores"]
    for role, score in roles.items():
        classes = f", classes {facts['classes']}" if facts["classes"] else ""
        times = f"{facts['sets']} x " if facts["sets"] > 1 else ""
        steps = score.get("steps") or 1
        sampled = f" in {steps} steps ({evaluations(steps)} evaluations)" if steps > 1 else ""
        made_by = f"{sampled} on {score['engine']}, seeds {facts['seeds']}{classes}" if score["engine"] else ""
        click.echo(f"{role}: {times}{score['samples']} images of {score['source']}{made_by}")
    reference, extractor = facts["reference"], facts["extractor"]
    size = f", {reference['samples']} images" if reference["samples"] else ""
    click.echo(f"reference: {reference['name']}{size}")
    accuracy = extractor["heldout_accuracy"]
    skill = "" if accuracy is None else f", right on {accuracy:.1%} of held-out images"
    resizing = f", images resized {extractor['resizing']}" if extractor.get("resizing") else ""
    click.echo(f"extractor: {extractor['name']}{skill}, sha256 {extractor['sha256'][:16]}{resizing}")
    # A table is for reading, lines are for grep.
    (_print_table if sys.stdout.isatty() else _print_lines)(roles)
    if facts["distance_to_teacher_ratio"] is not None:
        click.echo(f"distance to the reference: {facts['distance_to_teacher_ratio']:.2f} times the teacher's")
    _print_least(roles)
    for note in facts["notes"]:
        click.echo(f"note: {note}")


def _print_table(roles: dict[str, RoleScores]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", *roles)
    for name in next(iter(roles.values()))["values"]:
        table.add_row(name, *(_value(score, name) if name in score["values"] else "" for score in roles.values()))
    Console().print(table)


def _print_lines(roles: dict[str, RoleScores]) -> None:
    for role, score in roles.items():
        for name in score["values"]:
            click.echo(f"{role} {name}: {_value(score, name)}")


def _value(score: RoleScores, name: str) -> str:
    spread = f" +- {score['spread'][name]:.2g}" if "spread" in score else ""
    return f"{score['values'][name]:.4g}{spread}"


def _print_least(roles: dict[str, RoleScores]) -> None:
    """Print the smallest distance of several sets, which many papers report as their result."""
    for role, score in roles.items():
        for name, value in score.get("least", {}).items():
            if name == "FID" or name.startswith("FD("):
                sets = len(score["by_set"])
                click.echo(f"{role} {name}, best of {sets}: {value:.4g} (what EDM and its followers report; the mean is above)")
