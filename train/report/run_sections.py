"""Sections of the report that need no images: what was trained, the objective, warnings and time."""

import torch

from uni_instruct import __version__
from uni_instruct.spec import evaluations
from uni_instruct.train.dry_run.cost import phases
from uni_instruct.train.dry_run.report import needs, phase_lines
from uni_instruct.train.monitoring.clock import TIMED_STAGES
from uni_instruct.train.report.inputs import ReportInputs
from uni_instruct.train.report.markdown import duration, table, text

ACTIVITIES = {"steps": "steps", "evaluation": "evaluation", "saving": "writing states", "preparation": "preparation"}


def subject_section(inputs: ReportInputs) -> list[str]:
    """A table of recipe, data, network, teacher and student."""
    recipe, spec = inputs.plan.recipe, inputs.spec
    channels, height, width = spec.image_shape
    classes = f"{spec.num_classes} classes" if spec.num_classes else "no classes"
    args = ", ".join(f"{name} {value}" for name, value in spec.network_args.items())
    steps = inputs.teacher.spec.steps
    wanted = needs(inputs.plan)
    distillation = recipe.distillation
    facts = {
        "recipe": f"{recipe.name} (recipe.yaml has every key)",
        "real data": wanted["real_data"],
        "images": f"{width}x{height}x{channels}, {classes}",
        "network": f"{spec.network}, {inputs.parameters:,} parameters: {args}",
        "teacher": f"{wanted['teacher']}; sampled in {steps} steps ({evaluations(steps)} evaluations of the network)",
        "student": f"one step from noise level {spec.sigma_init:g}; {distillation.duration_kimg:g} kimg "
        f"in steps of {distillation.batch} images, method {recipe.objective.method}",
        "student's start": wanted["generator_start"],
        "density ratio": wanted["density_ratio"],
        "random seed, precision": f"{recipe.loop.seed}, {recipe.loop.precision}",
        "versions": f"uni-instruct {__version__}, torch {torch.__version__}",
    }
    lines = table(("", ""), ((name, text(words)) for name, words in facts.items()), numbers_from=2)
    for stage in ("teacher", "generator"):
        best = inputs.best(stage)
        if best is not None:
            lines += [
                "",
                f"The {stage}'s weights are those after step {best.step} ({best.kimg:.4g} kimg), the best by "
                f"{text(best.name)}: {best.value:.4g}.",
            ]
    return lines


def objective_section(inputs: ReportInputs) -> list[str]:
    """What the generator minimised and the critic learned, as text for each phase."""
    lines = []
    for phase in phases(inputs.plan.recipe):
        alone = ", warm-up of the critic" if phase.critic_alone else ""
        lines += ["", f"**{phase.from_kimg:g} to {phase.until_kimg:g} kimg{alone}**", ""]
        lines += [f"- {text(line)}" for line in phase_lines(inputs.plan, phase)]
    return lines[1:]


def warning_section(inputs: ReportInputs) -> list[str]:
    """The warnings that were logged while training; empty if there were none."""
    return [
        f"- {stage}, step {step}: {text(warning)}"
        for stage, history in inputs.history.items()
        for step, warning in history.warnings
    ]


def time_section(inputs: ReportInputs, report_s: float) -> list[str]:
    """A table of the time of every activity, summed over all calls of the run, and the speed of each stage."""
    spent = [(stage, name, time_s) for stage, parts in inputs.times.items() for name, time_s in parts.items()]
    spent += [("run", "this report", report_s)]
    # The report's own time is included, because the user waits for it too.
    total_s = sum(time_s for *_, time_s in spent)
    rows = [
        ("" if stage == "run" else stage, ACTIVITIES.get(name, name), duration(time_s), f"{time_s / total_s:.1%}")
        for stage, name, time_s in sorted(spent, key=lambda part: TIMED_STAGES.index(part[0]))
    ]
    rows.append(("**in all**", "", f"**{duration(total_s)}**", ""))
    lines = table(("stage", "", "time", "share"), rows, numbers_from=2)
    for stage, history in inputs.history.items():
        steps_s = inputs.times.get(stage, {}).get("steps", 0.0)
        kimg = max((record.kimg for record in history.records), default=0.0)
        # A stage that this run did not train has neither.
        if steps_s and kimg:
            lines += ["", f"{stage}: {1000 * kimg / steps_s:,.0f} images a second, without evaluation and saving."]
    return [*lines, "", "The times include interrupted and killed calls, and steps that had to be repeated after them."]
