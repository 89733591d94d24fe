"""The report's section on steps: the teacher's distance to the data by its number of steps, beside the one-step student's."""

import time

from uni_instruct.engine import open_engine
from uni_instruct.evaluate.class_draw import draw_classes
from uni_instruct.evaluate.scores import frechet_name
from uni_instruct.generate import generate_batches
from uni_instruct.spec import evaluations
from uni_instruct.system.files import atomic_file
from uni_instruct.train.report.curves import draw_steps
from uni_instruct.train.report.inputs import ReportInputs
from uni_instruct.train.report.markdown import duration, picture, table, text
from uni_instruct.train.report.scores import BATCH, samples_of_a_set

# n steps are 2 n - 1 evaluations: 3, 5, 9, 17, 35 and 79. Each is about twice the previous one. EDM uses 18 and 40 steps.
STEP_COUNTS = (2, 3, 5, 9, 18, 40)
BUDGET_S = 60.0


def step_section(inputs: ReportInputs) -> list[str]:
    """A table and a picture of the teacher's distance for as many step counts as BUDGET_S allows, the fewest first.

    Empty if the recipe's metric is not FD, or for latents.
    """
    evaluator, recipe = inputs.evaluator, inputs.plan.recipe
    if evaluator is None or recipe.loop.metric != "FD" or not inputs.makes_pictures:
        return []
    samples, name = samples_of_a_set(recipe.loop.samples), frechet_name(evaluator.extractor)
    scores = inputs.student_scores
    student = scores.values[name][0] if scores is not None else None
    s_per_evaluation = inputs.teacher_images.s_per_image / evaluations(inputs.teacher.spec.steps)
    start, measured = time.monotonic(), dict[int, float]()
    for steps in STEP_COUNTS:
        if time.monotonic() - start + s_per_evaluation * evaluations(steps) * samples > BUDGET_S:
            break
        measured[steps] = _distance(inputs, steps, samples)
    if not measured or student is None:
        return [f"Other numbers of steps were not scored: {STEP_COUNTS[0]} steps for {samples:,} samples take too long here."]
    with atomic_file(inputs.pictures / "steps.png") as partial:
        draw_steps(partial, {evaluations(steps): value for steps, value in measured.items()}, student, name)
    inputs.facts["teacher_by_steps"] = {str(steps): value for steps, value in measured.items()}
    rows = [("student, one step", "1", f"{student:.3g}")]
    rows += [(f"teacher, {steps} steps", str(evaluations(steps)), f"{value:.3g}") for steps, value in measured.items()]
    lines = [
        *table(("", "evaluations of the network", text(name)), rows),
        "",
        f"All scores use the same {samples:,} seeds. Heun's sampler takes two evaluations a step, and one in the last.",
        "",
        picture("steps.png", "the teacher's distance to the data against its evaluations, with the student's as a line"),
    ]
    missing = [steps for steps in STEP_COUNTS if steps not in measured]
    if missing:
        needed_s = s_per_evaluation * evaluations(missing[0]) * samples
        lines += ["", f"Not scored here: {', '.join(map(str, missing))} steps; {missing[0]} would take {duration(needed_s)}."]
    return lines


def _distance(inputs: ReportInputs, steps: int, samples: int) -> float:
    """The teacher's Frechet distance to the data with that number of steps."""
    evaluator = inputs.evaluator
    assert evaluator is not None
    engine = open_engine(inputs.teacher.with_steps(steps), "torch")
    seeds = range(samples)
    drawn = draw_classes(engine.spec, seeds, evaluator.reference)
    scores = evaluator.score_batches(generate_batches(engine, seeds, drawn.class_ids, BATCH), None, ["fd"])
    return scores.values[frechet_name(evaluator.extractor)]
