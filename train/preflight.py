"""The checks of `doctor`, before a long run: data, teacher, recipe, evaluation, run folder, devices, memory, disk."""

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
from uni_instruct.class_map import renumber_labels
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.networks.build import load_denoiser
from uni_instruct.train.config import Recipe
from uni_instruct.train.data_fingerprint import check_same_data, saved_classes
from uni_instruct.train.dry_run.cost import MB, Cost, cost_of, resolve_auto
from uni_instruct.train.optimization.auto_precision import exact
from uni_instruct.train.optimization.distributed import check_batches
from uni_instruct.train.plan import Plan, load_start, make_plan
from uni_instruct.train.recipe_changes import holds_training, saved_step
from uni_instruct.train.run import Run
from uni_instruct.train.run_lock import refuse_foreign, refuse_in_use
from uni_instruct.train.scoring_choice import choose_scoring

READ = 64  # number of images that are read, evenly spaced in the data
DENOISED = 4  # number of images on which a given teacher is tried
SIGMA = 0.5  # noise level of that trial


@dataclass(frozen=True)
class Finding:
    """The result of one check: what was checked, whether it is right, and a text, with the remedy if it is not."""

    subject: str
    ok: bool
    words: str


class Preflight:
    """The run that is checked. What several checks need is opened once and cached."""

    def __init__(self, recipe: Recipe, out: Path, devices: int):
        self.recipe, self.out, self.devices = recipe, out, devices

    @cached_property
    def dataset(self) -> Dataset | None:
        """The recipe's data set; None if it names none."""
        return open_dataset(self.recipe.data) if self.recipe.data else None

    @cached_property
    def plan(self) -> Plan:
        """The recipe's plan. Raises RequestError if its parts do not fit together."""
        return make_plan(self.recipe, saved_classes(self.out))

    @cached_property
    def cost(self) -> Cost:
        """The run's cost, counted but not timed."""
        return cost_of(resolve_auto(self.plan, measured=False), budget_s=0)


def examine(preflight: Preflight) -> list[Finding]:
    """The findings of all checks. A check fails by raising UniInstructError. If "recipe" fails, later checks are left out."""
    findings: list[Finding] = []
    for subject, check in CHECKS.items():
        try:
            words, ok = check(preflight), True
        except UniInstructError as error:
            words, ok = str(error), False
        findings.append(Finding(subject, ok, words))
        # If the parts do not fit together, there is no plan, which most of the remaining checks need.
        if subject == "recipe" and not ok:
            break  # leaves out evaluation, run, devices, memory and disk
    return findings


def _data(preflight: Preflight) -> str:
    dataset = preflight.dataset
    if dataset is None:
        return "the recipe names none"
    sampled = dataset.check_sample()
    # Evenly spaced, because files are often sorted by class.
    indices = np.unique(np.linspace(0, len(dataset) - 1, READ).astype(np.int64))
    values = dataset.floats(indices, [int(index) for index in indices])
    # Images of a single colour, such as masks from a wrong folder, would train without an error.
    if values.std() < 1e-3:
        problem = f"{len(indices)} images of '{dataset.name}' all have the same single colour"
        raise CheckFailed(problem, "give a data set of real pictures")
    classes = "no classes"
    if dataset.labels is not None:
        counts = np.bincount(dataset.labels, minlength=dataset.num_classes)
        classes = f"{dataset.num_classes} classes of {counts.min():,} to {counts.max():,} images"
        if not counts.min():
            raise CheckFailed(
                f"{int((counts == 0).sum())} of the {dataset.num_classes} classes of '{dataset.name}' have no image",
                "give the complete data set, or one whose labels have no unused classes",
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
    return f"{preflight.recipe.name}: recipe, data and teacher fit together; teacher: {trained}"


def _teacher(preflight: Preflight) -> str:
    """Denoise some of the data. A teacher of other data or of another pixel range leaves more error than the noise itself."""
    if not preflight.recipe.teacher.bundle:
        return "none given: it is trained first"
    dataset = preflight.dataset
    bundle = open_or_import(preflight.recipe.teacher.bundle, "teacher", dataset is not None and dataset.latents)
    if dataset is None:
        return f"{bundle.spec.name}: not tried, because the recipe names no data"
    indices = np.linspace(0, len(dataset) - 1, DENOISED).astype(np.int64)
    clean = torch.from_numpy(dataset.floats(indices, [int(index) for index in indices])).permute(0, 3, 1, 2)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with suppress(RequestError):  # if the classes do not match, the plan raises an error when they are needed
        dataset = renumber_labels(dataset, bundle.spec.class_names, "the teacher")
    fits = dataset.num_classes == bundle.spec.num_classes
    conditional = bundle.spec.num_classes and dataset.labels is not None and fits
    class_ids = torch.from_numpy(dataset.labels[indices]) if conditional and dataset.labels is not None else None
    with torch.no_grad():
        denoised = load_denoiser(bundle)(clean + SIGMA * noise, torch.full((len(clean), 1, 1, 1), SIGMA), class_ids)
    # mean |D(x + sigma n) - x|^2 / sigma^2: the share of the noise that is left. A denoiser that returns its input leaves 1.
    left = float(((denoised - clean) ** 2).mean() / SIGMA**2)
    seen = f"after denoising {len(clean)} images with noise level {SIGMA}, {left:.0%} of the noise is left"
    if not left < 1:
        raise CheckFailed(
            f"{bundle.spec.name}: {seen}", "give a teacher that was trained on this data, with pixels from -1 to 1"
        )
    return f"{bundle.spec.name}: {seen}"


def _evaluation(preflight: Preflight) -> str:
    return choose_scoring(preflight.recipe.loop, preflight.dataset).words


def _run(preflight: Preflight) -> str:
    """Check the run's folder as a training would: in use, resumable with this recipe and data, states readable."""
    out, recipe = preflight.out, preflight.recipe
    refuse_in_use(out)
    refuse_foreign(out)
    if not holds_training(out):
        return f"{out} contains no run yet"
    if preflight.plan.dataset is not None:
        check_same_data(out, preflight.plan.dataset, write=False)
    with closing(Run(out, recipe, first_process=False)) as run:
        stages = [stage for stage in ("teacher", "generator") if run.load_state(stage) is not None]
    at = ", ".join(f"{stage} at step {saved_step(out, stage):,}" for stage in stages)
    return f"{out} contains a run that will be resumed{f': {at}' if at else ''}"


def _devices(preflight: Preflight) -> str:
    gpus, asked = torch.cuda.device_count(), preflight.devices
    if gpus and asked > gpus:
        raise CheckFailed(
            f"--devices {asked} is more than the {gpus} GPUs of this machine", "give a smaller --devices, or use torchrun"
        )
    if preflight.recipe.loop.precision == "16-mixed" and not gpus:
        raise CheckFailed("loop.precision 16-mixed needs a GPU, and this machine has none", "--set precision=bf16-mixed")
    check_batches(preflight.recipe, asked)
    days = preflight.cost.gpu_days(exact(preflight.recipe.loop).precision)
    on = f"{asked} of {gpus} GPUs, {torch.cuda.get_device_name()}" if gpus else f"{asked} CPU processes, no GPU"
    return f"{on}; the run takes about {days:.3g} days of one H100 (train --dry-run shows this estimate)"


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
    # The run's folder may not exist yet, so the disk of its nearest existing parent is checked.
    folder = next(path for path in (preflight.out.absolute(), *preflight.out.absolute().parents) if path.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise CheckFailed(f"nothing can be written into {folder}", "choose another --out")
    free, needed = shutil.disk_usage(folder).free, preflight.cost.disk
    words = f"about {needed / MB:,.0f} MB needed, {free / MB:,.0f} MB free in {folder}"
    if needed > free:
        raise CheckFailed(words, "free space, choose another --out, or raise loop.snapshot_kimg")
    return words


class CheckFailed(UniInstructError):
    """A check of `doctor` failed."""

    def __init__(self, problem: str, remedy: str):
        super().__init__(problem, remedy=remedy)


# In the order in which a user would fix them.
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
