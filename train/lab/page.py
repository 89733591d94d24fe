"""Writes lab.md, lab.html, lab.json and their pictures: a table of variants, scores over time, quality and diversity."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import torch

from uni_instruct import __version__
from uni_instruct.system.files import atomic_file, atomic_folder
from uni_instruct.train.lab.experiments import Lab
from uni_instruct.train.lab.pictures import draw_distance, draw_paths
from uni_instruct.train.lab.results import (
    DIVERSITY_AXES,
    QUALITY_AXES,
    Outcome,
    metric_name,
    ranked,
    read_outcomes,
    teacher_best,
    to_json,
    values_of,
)
from uni_instruct.train.report.html import write_html
from uni_instruct.train.report.markdown import duration, picture, spread, table, text

COLUMNS = {"precision": "precision", "recall": "recall", "class_accuracy": "class accuracy"}


def write_page(lab: Lab, failed: dict[Path, str], command: Sequence[str]) -> Path:
    """Write the lab's page from its finished runs. Returns the path of lab.html.

    failed: folder -> last line of output of experiments that failed. command: the words of the lab's command line.
    """
    outcomes = read_outcomes(lab, failed)
    with atomic_folder(lab.folder / "report") as pictures:
        with atomic_file(pictures / "distance.png") as partial:
            draw_distance(partial, lab, outcomes, teacher_best(lab))
        quality = next((axis for axis in QUALITY_AXES if axis.known(outcomes)), None)
        diversity = next((axis for axis in DIVERSITY_AXES if axis.known(outcomes)), None)
        if quality is not None and diversity is not None:
            with atomic_file(pictures / "quality-diversity.png") as partial:
                draw_paths(partial, lab, outcomes, quality, diversity)
    blocks = [
        f"# Lab: {text(lab.experiments[0].recipe.name)}",
        "\n".join(_introduction(lab, outcomes)),
        "## Scores\n\n" + "\n".join(_table(lab, outcomes)),
        "## Over time\n\n" + picture("distance.png", "the score of every variant over thousands of images seen"),
    ]
    if (lab.folder / "report" / "quality-diversity.png").exists():
        blocks.append("## Quality and diversity\n\n" + picture("quality-diversity.png", "paths of every variant"))
        blocks.append("Each line is an experiment's path, from its first evaluation (small point) to its last (large point).")
    blocks += _failures(outcomes)
    blocks.append(f"## Commands\n\n```sh\n{shlex.join(command)}\ntensorboard --logdir {shlex.quote(str(lab.folder))}\n```")
    page = "\n\n".join(blocks) + "\n"
    for name, content in (("lab.md", page), ("lab.json", to_json(lab, outcomes))):
        with atomic_file(lab.folder / name) as partial:
            partial.write_text(content)
    return write_html(page, lab.folder / "lab.html")


def _introduction(lab: Lab, outcomes: Sequence[Outcome]) -> list[str]:
    distillation, loop = lab.experiments[0].recipe.distillation, lab.experiments[0].recipe.loop
    teacher = teacher_best(lab)
    seeds = sorted({experiment.seed for experiment in lab.experiments})
    lines = [
        f"{len(lab.variants)} variants, {len(seeds)} seed{'s' * (len(seeds) > 1)} each ({', '.join(map(str, seeds))}), all "
        f"from one teacher: {distillation.duration_kimg:g} kimg in steps of {distillation.batch} images unless a variant "
        f"says otherwise. Scores are of {loop.samples:,} samples, of the best weights of each experiment; ± is the standard "
        "deviation over seeds.",
        "",
        f"uni-instruct {__version__}, torch {torch.__version__}, precision {text(loop.precision)}.",
    ]
    if teacher is not None:
        lines += ["", f"The teacher's own {text(teacher.name)}: {teacher.value:.3g}."]
    if len(seeds) < 3:
        lines += [
            "",
            "With fewer than three seeds, differences of a few per cent mean nothing: repeated trainings differ as much.",
        ]
    return lines


def _table(lab: Lab, outcomes: Sequence[Outcome]) -> list[str]:
    metric = metric_name(outcomes)
    names = [name for name in (metric, *COLUMNS) if any(values_of([o], name) for o in outcomes)]
    rows = []
    for variant, group in ranked(lab, outcomes):
        best = [o.best.kimg for o in group if o.best is not None]
        time_s = [o.steps_s for o in group if o.steps_s]
        cells = [spread(values) if (values := values_of(group, name)) else "" for name in names]
        rows.append(
            (
                text(variant.name),
                *cells,
                spread(best) if best else "",
                duration(sum(time_s) / len(time_s)) if time_s else "",
            )
        )
    return table(
        ("variant", *(COLUMNS.get(name, text(name)) for name in names), "best after kimg", "time in training steps"), rows
    )


def _failures(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [f"- {text(o.experiment.folder.name)}: {text(o.failure)}" for o in outcomes if o.failure]
    warned = [
        f"- {text(o.experiment.folder.name)}, step {step}: {text(words)}"
        for o in outcomes
        for step, words in o.history.warnings
    ]
    return ["## Experiments that failed\n\n" + "\n".join(lines)] * bool(lines) + ["## Warnings\n\n" + "\n".join(warned)] * bool(
        warned
    )
