"""Sections of the report on the results: samples, scores, nearest training images and curves."""

import numpy as np
import torch

from uni_instruct.evaluate import Evaluator
from uni_instruct.images import contact_sheet, encode
from uni_instruct.system.files import atomic_file
from uni_instruct.train.monitoring import scores as selection
from uni_instruct.train.report.curves import draw, panels, phase_edges
from uni_instruct.train.report.inputs import ReportInputs
from uni_instruct.train.report.markdown import duration, picture, spread, table, text
from uni_instruct.train.report.neighbours import NeighbourDistances, by_features, by_pixels, searched_indices
from uni_instruct.train.report.pictures import neighbour_sheet
from uni_instruct.train.report.scores import SetScores, samples_of_a_set, score_data, score_sets

SHOWN = 6  # samples shown above their neighbours: the first ones, and as many of those nearest to training images
NAMES = {"class_accuracy": "class accuracy"}
_NO_PICTURES = (
    "No pictures: this generator makes latents of a VAE, and has no decoder yet. The section Commands shows how to attach one."
)


def sample_section(inputs: ReportInputs) -> list[str]:
    """Grids of teacher and student from the same noise and classes."""
    if not inputs.makes_pictures:
        return [_NO_PICTURES]
    grid, teacher = inputs.grid, inputs.teacher_images
    student = inputs.samples
    # The teacher draws as many rows as the time allows. Only as many of the student's are shown, so that both grids match.
    count = min(len(teacher.images), len(student.images))
    for name, images in (("teacher", teacher.images[:count]), ("student", student.images[:count])):
        with atomic_file(inputs.pictures / f"{name}.png") as partial:
            partial.write_bytes(encode(contact_sheet(images, grid.columns)))
    names = ", ".join(inputs.spec.class_name(number) for number in range(grid.columns)) if grid.by_class else ""
    return [
        f"Seeds 0 to {count - 1}: at the same place, teacher and student start from the same noise"
        + (" and class." if inputs.spec.num_classes else ".")
        + (f" Columns: {text(names)}." if names else ""),
        "",
        f"**Teacher**, {inputs.teacher.spec.steps} steps, {1000 * teacher.s_per_image:.3g} ms an image here",
        "",
        picture("teacher.png", "samples of the teacher"),
        "",
        f"**Student**, one step, {1000 * student.s_per_image:.3g} ms an image here",
        "",
        picture("student.png", "samples of the student from the same noise"),
    ]


def score_section(inputs: ReportInputs) -> list[str]:
    """A table of the scores of student, teacher and training images, on seeds that were not used to choose weights."""
    recipe, evaluator = inputs.plan.recipe, inputs.evaluator
    if evaluator is None:
        return ["There are no scores, because the recipe's metric is none. `uni-instruct evaluate` scores the generator."]
    samples = samples_of_a_set(recipe.loop.samples)
    student = inputs.student_scores
    s_per_image = inputs.teacher_images.s_per_image
    teacher = score_sets(evaluator, inputs.teacher_engine, recipe.loop.metric, samples, s_per_image)
    rows = {
        "student, one step": student,
        f"teacher, {inputs.teacher.spec.steps} steps": teacher,
        "training images drawn at random": score_data(evaluator, recipe.loop.metric, samples),
        "student, best evaluation during training": _best_while_training(inputs, "generator"),
        "teacher, best evaluation during training": _best_while_training(inputs, "teacher"),
    }
    known = {name: scores for name, scores in rows.items() if scores is not None}
    inputs.facts["scores"] = {name: {"samples": s.samples, **s.values} for name, s in known.items()}
    lines = _score_table(known)
    sets = max(scores.sets for scores in (student, teacher) if scores is not None)
    lines += [
        "",
        f"Mean ± standard deviation of sets of {samples:,} samples, from seeds 0 to at most {sets * samples - 1:,}, which "
        f"were not used to choose the weights. Reference: {text(evaluator.reference.name)}, {len(evaluator.reference):,} "
        "images. Distances depend on the number of samples. Evaluations during training are on the seeds by which the weights "
        "were chosen, so the best of them is slightly too good.",
    ]
    # The text explains a missing row, so that it is not mistaken for an error.
    if teacher is None:
        lines += ["", f"The teacher was not scored again: {samples:,} samples take {duration(s_per_image * samples)} here."]
    if not selection.affords_pr(len(evaluator.reference)):
        lines += [
            "",
            "Precision and recall are measured neither here nor during training: the reference has more than "
            f"{selection.MAX_REFERENCE_FOR_PR:,} images, and they compare all pairs. `uni-instruct evaluate` measures them.",
        ]
    return lines + [f"\nNote: {text(note)}." for note in dict.fromkeys(n for s in (student, teacher) if s for n in s.notes)]


def neighbour_section(inputs: ReportInputs) -> list[str]:
    """Samples above their nearest training images, and a table of the distances."""
    if not inputs.makes_pictures:
        return [_NO_PICTURES]
    dataset = inputs.plan.dataset
    if dataset is None:
        return ["Nothing to compare with: the run was trained without data."]
    samples = inputs.samples.images
    found = [by_pixels(dataset, samples), _by_features(inputs.evaluator, samples)]
    spaces = [space for space in found if space is not None]
    searched = len(searched_indices(dataset))
    among = f"{searched:,}" if searched == len(dataset) else f"{searched:,} of {len(dataset):,}, evenly spaced,"
    lines = [
        f"Of {len(samples)} samples, the nearest among {among} training images, beside the nearest other training image of "
        f"{len(spaces[0].training.distances)} training images.",
        "",
    ]
    lines += _neighbour_table(spaces)
    inputs.facts["nearest_training_images"] = {
        space.space: {"medians": list(space.medians), "nearer": space.nearer_share, "copies": list(space.copied_share)}
        for space in spaces
    }
    lines += [
        "",
        "Nearer: the share of samples whose nearest training image is closer than the median of the column 'data to data'. "
        "50 % is expected; much more suggests copying. Copies: the nearest is less than a third as far as the second nearest.",
    ]
    for number, space in enumerate(spaces):
        file = f"neighbours-{('pixels', 'features')[number]}.png"
        with atomic_file(inputs.pictures / file) as partial:
            partial.write_bytes(encode(_neighbour_sheet(inputs, space)))
        lines += [
            "",
            f"By {text(space.space)}. Top row: samples; below each, its nearest training images, the nearest first. Left: the "
            "first seeds. Right: of all samples, those that are nearest to a training image.",
            "",
            picture(file, f"samples and their nearest training images by {space.space}"),
        ]
    return lines


def curve_section(inputs: ReportInputs) -> list[str]:
    """A picture of curves for each stage."""
    lines = []
    for stage, history in inputs.history.items():
        teacher = inputs.best("teacher") if stage == "generator" else None
        shown = panels(stage, history, inputs.plan.recipe, teacher)
        edges = phase_edges(inputs.plan.recipe) if stage == "generator" else []
        with atomic_file(inputs.pictures / f"curves-{stage}.png") as partial:
            draw(partial, stage.capitalize(), shown, edges)
        lines += ["", picture(f"curves-{stage}.png", f"curves of the {stage}")]
        lines += ["", "Dotted lines: changes of the objective."] if edges else []
    return lines[1:]


def _best_while_training(inputs: ReportInputs, stage: str) -> SetScores | None:
    best = inputs.best(stage)
    if best is None:
        return None
    return SetScores(samples=inputs.plan.recipe.loop.samples, values={name: [value] for name, value in best.scores.items()})


def _score_table(rows: dict[str, SetScores]) -> list[str]:
    student = next(iter(rows.values()))
    names = list(
        dict.fromkeys([*student.values, *(n for s in rows.values() for n in s.values if n in ("precision", "recall"))])
    )
    cells = (
        [name, f"{scores.sets} x {scores.samples:,}", *(spread(scores.values[n]) if n in scores.values else "" for n in names)]
        for name, scores in rows.items()
    )
    return table(("", "samples", *(NAMES.get(name, text(name)) for name in names)), cells)


def _neighbour_table(spaces: list[NeighbourDistances]) -> list[str]:
    rows = []
    for space in spaces:
        (samples, data), (copies, twins) = space.medians, space.copied_share
        unit = f" {space.unit}" if space.unit else ""
        rows.append(
            (
                text(space.space),
                f"{samples:.3g}{unit}",
                f"{data:.3g}{unit}",
                f"{space.nearer_share:.1%}",
                f"{copies:.1%}",
                f"{twins:.1%}",
            )
        )
    header = ("by", "sample to data, median", "data to data, median", "nearer", "copies", "copies in the data")
    return table(header, rows)


def _by_features(evaluator: Evaluator | None, samples: np.ndarray) -> NeighbourDistances | None:
    return by_features(evaluator, samples) if evaluator is not None else None


def _neighbour_sheet(inputs: ReportInputs, space: NeighbourDistances) -> np.ndarray:
    dataset, samples = inputs.plan.dataset, inputs.samples.images
    assert dataset is not None
    # Those nearest to a training image are shown too, because the first samples may miss the few copies.
    order = space.samples.distances[:, 0].argsort()
    chosen = torch.cat([torch.arange(min(SHOWN, len(samples))), order[:SHOWN]])
    indices = space.samples.indices[chosen].numpy()
    neighbours = dataset.images(indices.flatten()).reshape(*indices.shape, *samples.shape[1:])
    return neighbour_sheet(samples[chosen.numpy()], neighbours)
