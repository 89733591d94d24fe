"""The output of `train --dry-run`: objective as text, what the run needs, what it costs, and the complete recipe."""

import json
import textwrap
from collections.abc import Iterable, Sequence

import yaml

from uni_instruct.data import Dataset
from uni_instruct.spec import evaluations
from uni_instruct.train.config import Recipe
from uni_instruct.train.dry_run.cost import GPU_SHARE, MB, Cost, Memory, Phase, StageCost, cost_of, resolve_auto
from uni_instruct.train.dry_run.formula import critic_lines, method_lines, objective_lines
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.plan import Plan, make_plan

WIDTH = 120


def explain(recipe: Recipe, as_json: bool) -> str:
    """Open what the recipe names, and count and time its steps.

    Returns the recipe as YAML with everything else as comments before it, or one JSON object. Raises RequestError if parts of
    the recipe do not fit together.
    """
    plan = make_plan(recipe)
    if plan.dataset is not None:
        plan.dataset.check_sample()  # the same check as at the start of a training
    plan = resolve_auto(plan)
    cost = cost_of(plan)
    if as_json:
        return json.dumps(facts(plan, cost))
    sections = {
        "OBJECTIVE": _phases_in_blocks(plan, cost.phases),
        "NEEDS": [f"{name.replace('_', ' ')}: {words}" for name, words in needs(plan).items()],
        "COST": cost_lines(plan, cost),
    }
    comments = "\n#\n".join(f"# {title}\n" + "\n".join(map(_comment, lines)) for title, lines in sections.items())
    return f"{comments}\n\n{yaml.safe_dump(recipe.to_dict(), sort_keys=False)}"


def facts(plan: Plan, cost: Cost) -> dict[str, object]:
    """The content of the JSON output. Times are None if they could not be measured."""
    stages = cost.stages.items()
    timings = {name: stage.timing for name, stage in stages}
    return {
        "recipe": plan.recipe.to_dict(),
        "objective": [
            {
                "from_kimg": phase.from_kimg,
                "until_kimg": phase.until_kimg,
                "critic_alone": phase.critic_alone,
                "flops_per_image": flops,
                "lines": phase_lines(plan, phase),
            }
            for phase, flops in zip(cost.phases, cost.generator.flops_per_image, strict=True)
        ],
        "needs": needs(plan),
        "parameters": cost.parameters,
        "images": {name: sum(stage.images) for name, stage in stages},
        "flops_per_image": {name: stage.flops_per_image[-1] for name, stage in stages},
        "flops": cost.flops,
        "memory_mb": {name: _memory_mb(stage.memory) for name, stage in stages},
        "s_per_1000_images": {name: timing and 1000 * timing.s_per_image for name, timing in timings.items()},
        "measured_on": {"device": cost.device, "images": {name: timing and timing.images for name, timing in timings.items()}},
        "time_s": cost.time_s,
        "disk_mb": cost.disk / MB,
        "h100_days_assumed": cost.gpu_days(plan.recipe.loop.precision),
    }


def phase_lines(plan: Plan, phase: Phase) -> list[str]:
    """What a phase minimises and what the critic learns, as lines of text."""
    critic = critic_lines(phase.objective, plan.recipe)
    return critic if phase.critic_alone else [*method_lines(phase.objective), *objective_lines(phase.objective), *critic]


def needs(plan: Plan) -> dict[str, str]:
    """What the run needs: data, density ratio, reward, teacher, start weights and pairs, each with the reason."""
    recipe, given, start = plan.recipe, plan.given_teacher, plan.start
    pairs = max((o.regression_pairs for o in recipe.objectives if o.regression_scale), default=0)
    trained = f"trained first, {recipe.teacher.duration_kimg:g} kimg in steps of {recipe.teacher.batch} images"
    return {
        "real_data": _data_need(plan),
        "density_ratio": _ratio_need(recipe.objectives),
        "reward": next((o.reward for o in recipe.objectives if o.reward_scale), "none"),
        "teacher": trained if given is None else f"given, {given.path}",
        "generator_start": "the teacher's weights" if start is None else str(start.path),
        "pairs": f"{pairs:,} images of the teacher's, {evaluations(recipe.teacher.steps)} evaluations each"
        if pairs
        else "none",
    }


def cost_lines(plan: Plan, cost: Cost) -> list[str]:
    """Parameters, images, FLOPs, memory, time and disk, as lines of text."""
    lines = [
        "parameters: " + ", ".join(f"{name.replace('_', ' ')} {number:,}" for name, number in cost.parameters.items()),
        "images: " + ", ".join(f"{name} {sum(stage.images):,}" for name, stage in cost.stages.items()),
    ]
    for name, stage in cost.stages.items():
        lines.append(f"{name}, FLOPs of a step per image, forward and backward: {_flops_words(cost, stage)}")
        lines.append(f"{name}, memory of a process: {_memory_words(stage)}")
        lines.append(f"{name}, time: {_time_words(stage)}")
    in_all = "" if cost.time_s is None else f", {_duration(cost.time_s)} in one process here"
    precision = plan.recipe.loop.precision
    days = f"{_number(cost.gpu_days(precision))} days of one H100, if it reaches {GPU_SHARE:.0%} of its peak in {precision}"
    return [
        *lines,
        f"whole run: {_flops(cost.flops)}{in_all}, without evaluation and saving; about {days}",
        f"disk: {_number(cost.disk / MB)} MB, without samples and logs",
        f"here: {cost.device}",
    ]


def _comment(line: str) -> str:
    """The line as a YAML comment, wrapped at WIDTH. Newlines become spaces."""
    indent = "#   " + " " * (len(line) - len(line.lstrip()))
    # A comment, so that the whole output is a valid recipe file.
    return textwrap.fill(
        line.strip(),
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _phases_in_blocks(plan: Plan, phases: Iterable[Phase]) -> list[str]:
    lines = []
    for phase in phases:
        alone = ", warm-up of the critic" if phase.critic_alone else ""
        lines.append(f"{phase.from_kimg:g} to {phase.until_kimg:g} kimg{alone}:")
        lines += [f"  {line}" for line in phase_lines(plan, phase)]
    return lines


def _data_need(plan: Plan) -> str:
    objectives, metric = plan.recipe.objectives, plan.recipe.loop.metric
    reasons = {
        "to train the teacher": plan.given_teacher is None,
        "for the density ratio": any(o.needs_ratio for o in objectives),
        "for the adversarial term": any(o.adversarial_scale for o in objectives),
        f"for the metric {metric}": metric != "none",
    }
    why = ", ".join(reason for reason, holds in reasons.items() if holds)
    # A user who named a data set should know that it is not used.
    if not why:
        named = "" if plan.dataset is None else f" ({_described(plan.dataset)}, named in the recipe but not used)"
        return f"none needed, as the teacher is given and no density ratio, adversarial term or metric is asked for{named}"
    assert plan.dataset is not None
    note = f"; {plan.dataset.note}" if plan.dataset.note else ""
    return f"{_described(plan.dataset)}: {why}{note}"


def _ratio_need(objectives: Sequence[ObjectiveConfig]) -> str:
    needy = dict.fromkeys(o.divergence for o in objectives if o.needs_ratio)
    if needy:
        return f"learned by the discriminator, for {', '.join(needy)}"
    constant = dict.fromkeys(o.divergence for o in objectives if o.divergence_scale)
    return f"none needed, as the weight h of {', '.join(constant)} is constant" if constant else "none needed"


def _described(dataset: Dataset) -> str:
    channels, height, width = dataset.image_shape
    classes = f", {dataset.num_classes} classes" if dataset.num_classes else ""
    return f"{dataset.name}, {len(dataset):,} images of {width}x{height}x{channels}{classes}"


def _flops_words(cost: Cost, stage: StageCost) -> str:
    if stage is not cost.generator:
        return _flops(stage.flops_per_image[-1])
    flops = zip(cost.phases, stage.flops_per_image, strict=True)
    return ", ".join(f"{_flops(each)} until {phase.until_kimg:g} kimg" for phase, each in flops)


def _memory_words(stage: StageCost) -> str:
    memory, timing = _memory_mb(stage.memory), stage.timing
    total, activations = memory.pop("total"), memory.pop("activations_estimate")
    parts = " + ".join(f"{name.replace('_', ' ')} {_number(number)}" for name, number in memory.items())
    estimate = f"estimate for {stage.micro_batch} images at once: tensors saved by autograd, without temporary buffers"
    words = f"about {_number(total)} MB = {parts} + activations {_number(activations)} ({estimate})"
    if timing is None or timing.peak_bytes is None:
        return words
    return f"{words}; {_number(timing.peak_bytes / MB)} MB measured with {timing.images} images"


def _time_words(stage: StageCost) -> str:
    if stage.timing is None or stage.time_s is None:
        return "not measured, as it needs more memory than is free here"
    speed = f"{_number(1000 * stage.timing.s_per_image)} s per 1,000 images, {_duration(stage.time_s)} in all"
    if not stage.timing.images:
        why = "timing a step would take too much time or memory"
        return f"about {speed} (estimated by FLOPs from one evaluation of the teacher, because {why})"
    return f"{speed} (a step measured on {stage.timing.images} images here)"


def _memory_mb(memory: Memory) -> dict[str, float]:
    return {
        "weights": memory.weights / MB,
        "gradients": memory.gradients / MB,
        "adam_moments": memory.moments / MB,
        "averages": memory.averages / MB,
        "activations_estimate": memory.activations / MB,
        "total": memory.total / MB,
    }


def _flops(number: float) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 1000:
            return f"{number:.3g} {prefix}FLOPs"
        number /= 1000
    return f"{_number(number)} EFLOPs"


def _duration(time_s: float) -> str:
    for unit, seconds in (("days", 86400), ("h", 3600), ("min", 60)):
        if time_s >= 2 * seconds:
            return f"{_number(time_s / seconds)} {unit}"
    return f"{time_s:.3g} s"


def _number(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:,.0f}"
