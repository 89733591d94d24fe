"""What could spoil a long run, looked for before it starts: recipe, data, teacher, devices, memory, disk."""

import os
import shutil
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from uni_instruct.checkpoints.import_bundle import open_or_import
from uni_instruct.class_map import numbered_as
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.networks.build import load_denoiser
from uni_instruct.train.config import Recipe
from uni_instruct.train.dry_run.cost import MB, Cost, cost_of, settled
from uni_instruct.train.judging import choose_judge
from uni_instruct.train.optimization.auto_precision import exact
from uni_instruct.train.plan import Plan, load_start, make_plan
from uni_instruct.train.recipe_changes import holds_training, saved_step
from uni_instruct.train.run import Run
from uni_instruct.train.run_lock import refuse_taken
from uni_instruct.train.same_data import check_same_data, saved_classes

READ = 64  # images that are read, spread over the data
DENOISED = 4
SIGMA = 0.5


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is right, and what was seen, with the remedy where it is not."""

    subject: str
    ok: bool
    words: str


class Preflight:
    """A run as it is asked for. What several checks look at is opened once."""

    def __init__(self, recipe: Recipe, out: Path, devices: int):
        self.recipe, self.out, self.devices = recipe, out, devices

    @cached_property
    def dataset(self) -> Dataset | None:
        """The recipe's data."""
        return open_dataset(self.recipe.data) if self.recipe.data else None

    @cached_property
    def plan(self) -> Plan:
        """The recipe's parts, held against each other."""
        return make_plan(self.recipe, saved_classes(self.out))

    @cached_property
    def cost(self) -> Cost:
        """Counted, not timed."""
        return cost_of(settled(self.plan, measured=False), budget_s=0)


def examine(preflight: Preflight) -> list[Finding]:
    """Every check's finding. A check that the project's own error ends is not right; what hangs on it is left out."""
    findings: list[Finding] = []
    for subject, check in CHECKS.items():
        try:
            words, ok = check(preflight), True
        except UniInstructError as error:
            words, ok = str(error), False
        findings.append(Finding(subject, ok, words))
        # Without parts that fit there is no network to count.
        if subject == "recipe" and not ok:
            break  # the rest counts what the recipe comes to
    return findings


def _data(preflight: Preflight) -> str:
    dataset = preflight.dataset
    if dataset is None:
        return "none named"
    sampled = dataset.check_sample()
    # Spread over all of it: files are often sorted by class.
    indices = np.unique(np.linspace(0, len(dataset) - 1, READ).astype(np.int64))
    values = dataset.floats(indices, [int(index) for index in indices])
    # A wrong folder of masks or thumbnails trains without an error.
    if values.std() < 1e-3:
        raise CheckFailed(f"{len(indices)} images of '{dataset.name}' are all one colour", "give pictures that differ")
    classes = "no classes"
    if dataset.labels is not None:
        counts = np.bincount(dataset.labels, minlength=dataset.num_classes)
        classes = f"{dataset.num_classes} classes of {counts.min():,} to {counts.max():,} images"
        if not counts.min():
            raise CheckFailed(
                f"{int((counts == 0).sum())} of the {dataset.num_classes} classes of '{dataset.name}' have no image",
                "give all of the data, or data with the number of classes that it has",
            )
    channels, height, width = dataset.image_shape
    read = f"{sampled:,} of {len(dataset):,} images of {width}x{height}x{channels} read"
    note = f"; {dataset.note}" if dataset.note else ""
    return f"{dataset.name}: {read}, {classes}; 'uni-instruct data check' reads all{note}"


def _recipe(preflight: Preflight) -> str:
    plan = preflight.plan
    if plan.start is not None:
        load_start(plan.start, plan.teacher_spec)
    trained = "trained first" if plan.given_teacher is None else f"given, {plan.given_teacher.spec.name}"
    return f"{preflight.recipe.name}: the parts fit each other, teacher {trained}"


def _teacher(preflight: Preflight) -> str:
    """Denoises some of the data: a teacher of other data, or one whose pixels have another range, does worse than nothing."""
    if not preflight.recipe.teacher.bundle:
        return "none given: it is trained first"
    dataset = preflight.dataset
    bundle = open_or_import(preflight.recipe.teacher.bundle, "teacher", dataset is not None and dataset.latents)
    if dataset is None:
        return f"{bundle.spec.name}: there are no data to try it on"
    indices = np.linspace(0, len(dataset) - 1, DENOISED).astype(np.int64)
    clean = torch.from_numpy(dataset.floats(indices, [int(index) for index in indices])).permute(0, 3, 1, 2)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with suppress(RequestError):  # other classes than the data's: the plan says so where they matter
        dataset = numbered_as(dataset, bundle.spec.class_names, "the teacher")
    fits = dataset.num_classes == bundle.spec.num_classes
    conditional = bundle.spec.num_classes and dataset.labels is not None and fits
    class_ids = torch.from_numpy(dataset.labels[indices]) if conditional and dataset.labels is not None else None
    with torch.no_grad():
        denoised = load_denoiser(bundle)(clean + SIGMA * noise, torch.full((len(clean), 1, 1, 1), SIGMA), class_ids)
    # What share of the noise is left: a denoiser that gives back its input leaves all of it.
    left = float(((denoised - clean) ** 2).mean() / SIGMA**2)
    seen = f"of noise of {SIGMA} on {len(clean)} images it leaves {left:.0%}"
    if not left < 1:
        raise CheckFailed(f"{bundle.spec.name}: {seen}", "give the teacher of these data, whose pixels run from -1 to 1")
    return f"{bundle.spec.name}: {seen}"


def _evaluation(preflight: Preflight) -> str:
    return choose_judge(preflight.recipe.loop, preflight.dataset).words


def _run(preflight: Preflight) -> str:
    """What a training would find in the folder: another one, a recipe that does not go on as this one, a damaged state."""
    out, recipe = preflight.out, preflight.recipe
    refuse_taken(out)
    if not holds_training(out):
        return f"{out} holds no training yet"
    if preflight.plan.dataset is not None:
        check_same_data(out, preflight.plan.dataset, write=False)
    with closing(Run(out, recipe, first_process=False)) as run:
        stages = [stage for stage in ("teacher", "generator") if run.load_state(stage) is not None]
    at = ", ".join(f"{stage} at step {saved_step(out, stage):,}" for stage in stages)
    return f"{out} holds a run that goes on{f': {at}' if at else ''}"


def _devices(preflight: Preflight) -> str:
    gpus, asked = torch.cuda.device_count(), preflight.devices
    if gpus and asked > gpus:
        raise CheckFailed(f"--devices {asked} is more than the {gpus} GPUs of this machine", "ask for fewer, or use torchrun")
    if preflight.recipe.loop.precision == "16-mixed" and not gpus:
        raise CheckFailed("loop.precision 16-mixed needs a GPU, and this machine has none", "--set precision=bf16-mixed")
    for section in (preflight.recipe.teacher, preflight.recipe.distillation):
        if section.batch % asked:
            raise CheckFailed(
                f"{section.section}.batch {section.batch} is not divisible by {asked}", "choose another --devices"
            )
    days = preflight.cost.gpu_days(exact(preflight.recipe.loop).precision)
    on = f"{asked} of {gpus} GPUs, {torch.cuda.get_device_name()}" if gpus else f"{asked} CPU processes, no GPU"
    return f"{on}; the run takes about {days:.3g} days of one H100 (--dry-run says how that is reckoned)"


def _memory(preflight: Preflight) -> str:
    needed = max(stage.memory.total for stage in preflight.cost.stages.values())
    if torch.cuda.is_available():
        there, whose = torch.cuda.get_device_properties(0).total_memory, "of a GPU"
    else:
        there, whose = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // preflight.devices,
            "of this machine for a process",
        )
    words = f"about {needed / MB:,.0f} MB needed, {there / MB:,.0f} MB {whose}"
    if needed > there:
        raise CheckFailed(words, "lower distillation.micro_batch and teacher.micro_batch, or use more or larger devices")
    return words


def _disk(preflight: Preflight) -> str:
    # The run's folder need not be there yet; its disk is that of the nearest one that is.
    folder = next(path for path in (preflight.out.absolute(), *preflight.out.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(folder).free, preflight.cost.disk
    words = f"about {needed / MB:,.0f} MB needed, {free / MB:,.0f} MB free in {folder}"
    if needed > free:
        raise CheckFailed(words, "free space, choose another --out, or raise loop.snapshot_kimg")
    return words


class CheckFailed(UniInstructError):
    """A check's finding."""

    def __init__(self, problem: str, remedy: str):
        super().__init__(problem, remedy=remedy)


# In the order in which a user would mend them.
CHECKS: dict[str, Callable[[Preflight], str]] = {
    "data": _data,
    "teacher": _teacher,
    "recipe": _recipe,
    "evaluation": _evaluation,
    "run": _run,
    "devices": _devices,
    "memory": _memory,
    "disk": _disk,
}
