"""A whole run: recipe -> teacher -> one-step generator. Both models are written as bundles."""

import dataclasses
import logging
import time
from contextlib import closing
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric

from uni_instruct import __version__
from uni_instruct.bundle import CONFIG, Bundle
from uni_instruct.data import Dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate import Evaluator
from uni_instruct.evaluate.class_draw import class_counts
from uni_instruct.hub import is_on_hub
from uni_instruct.images import contact_sheet, encode
from uni_instruct.networks.build import build_denoiser, load_denoiser
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.reference import make_reference
from uni_instruct.spec import ModelSpec
from uni_instruct.system.progress import progress
from uni_instruct.train.card import model_card
from uni_instruct.train.config import Recipe
from uni_instruct.train.data_fingerprint import check_same_data, saved_classes
from uni_instruct.train.loop import Best, Loop, Stage
from uni_instruct.train.objective.pairs import Pairs, teacher_pairs
from uni_instruct.train.optimization.auto_precision import resolve_precision_for_run
from uni_instruct.train.optimization.distributed import check_batches, exit_together, start_fabric
from uni_instruct.train.optimization.precision import arithmetic_of
from uni_instruct.train.plan import Plan, load_start, make_plan
from uni_instruct.train.report.page import REPORT, report_is_current, write_report
from uni_instruct.train.rng import initial_weights
from uni_instruct.train.run import Run, lock_run_folder
from uni_instruct.train.scoring_choice import announce, announce_note, choose_scoring
from uni_instruct.train.stages.data_loader import DataLoader
from uni_instruct.train.stages.distillation import DistillationModels, DistillationStage
from uni_instruct.train.stages.teacher import TeacherStage

log = logging.getLogger(__name__)


def train(recipe: Recipe, out: Path, devices: int = 1, *, teacher_only: bool = False) -> Bundle:
    """Train a recipe into the folder `out`, or resume its run. Returns the generator's bundle.

    teacher_only: stop after the teacher and return its bundle. The same call without it continues from there.

    Raises RequestError, before anything is trained, if recipe, data, teacher, reward and devices do not fit together, or if
    another process trains in the same folder.
    """
    start = time.monotonic()
    if teacher_only and recipe.teacher.bundle:
        problem = f"--teacher-only trains a teacher, but the recipe already gives one ({recipe.teacher.bundle})"
        raise RequestError(problem, remedy="leave out teacher.bundle or --teacher-only", param="teacher-only")
    plan = make_plan(recipe, saved_classes(out))
    recipe = _resolved_recipe(plan, out)
    plan = dataclasses.replace(plan, recipe=recipe)
    # Both stages are checked now, although the second starts hours later, and before other processes start: one that failed
    # first would end this one before the error is shown. They are checked again: torchrun has its own number of processes.
    check_batches(recipe, devices)
    fabric = start_fabric(devices, recipe.loop.precision)
    with exit_together(fabric), arithmetic_of(recipe.loop.precision):
        check_batches(recipe, fabric.world_size)
        return _trained(plan, out, fabric, devices, start, teacher_only)


def _trained(plan: Plan, out: Path, fabric: Fabric, devices: int, start: float, teacher_only: bool) -> Bundle:
    recipe = plan.recipe
    with lock_run_folder(out, fabric) as lock, closing(Run(out, recipe, first_process=fabric.is_global_zero)) as run:
        lock.note(devices)
        if plan.dataset is not None:
            check_same_data(out, plan.dataset, write=fabric.is_global_zero)
        run.clock.add("run", "preparation", time.monotonic() - start)
        with run.clock.during("run", "preparation"):
            session = _Session(plan, run, fabric)
            teacher = plan.given_teacher or session.train_teacher()
            if teacher_only:
                return teacher
            generator = session.distil(teacher)
            run.note_changes("generator", recipe.distillation.total_steps)  # if both stages were already finished
        session.report()
        return generator


def _resolved_recipe(plan: Plan, out: Path) -> Recipe:
    """The plan's recipe with every `auto` resolved for this run."""
    recipe = plan.recipe
    scoring = choose_scoring(recipe.loop, plan.dataset)
    announce_note(plan.dataset)
    announce(scoring, recipe.loop)
    images = max(config.micro_batch or config.batch for config in (recipe.teacher, recipe.distillation))
    return dataclasses.replace(recipe, loop=resolve_precision_for_run(scoring.loop, plan.teacher_spec, images, out))


class _Session:
    """What the two stages of one call of `train` share."""

    def __init__(self, plan: Plan, run: Run, fabric: Fabric):
        self.plan, self.run, self.fabric = plan, run, fabric
        self.recipe, self.dataset = plan.recipe, plan.dataset
        # Only rank 0 scores. On other ranks the features of the reference would only cost memory.
        judged = fabric.is_global_zero and self.recipe.loop.metric != "none" and self.dataset is not None
        self.evaluator = None
        if judged and self.dataset is not None:
            self.evaluator = Evaluator(self.dataset, self.recipe.loop.extractor, progress)

    def train_teacher(self) -> Bundle:
        """The bundle teacher/, trained unless its saved state is already finished."""
        spec = self.plan.teacher_spec
        denoiser = initial_weights(lambda: build_denoiser(spec), self.recipe.loop.seed)
        stage = TeacherStage(denoiser, self._batches(self.recipe.teacher.batch), self.recipe, self.fabric)
        return self._train(stage, spec, "teacher")

    def distil(self, teacher: Bundle) -> Bundle:
        """The bundle generator/, distilled from the teacher unless its saved state is already finished."""
        config = self.recipe.distillation
        spec = dataclasses.replace(
            teacher.spec,
            name=self.recipe.name,
            steps=1,
            decoder=None,  # training does not decode latents; a VAE's decoder is attached to the finished bundle
            sigma_init=config.sigma_init,
            provenance={
                "recipe": self.recipe.to_dict(),
                "data": self.dataset.source if self.dataset else "",
                "teacher": _ancestry(teacher),
                **_class_counts(teacher.spec, self.dataset),
                "teacher_sha256": teacher.weights_sha256,
                "uni_instruct": __version__,
            },
        )
        denoiser = load_denoiser(teacher)
        pairs = self._pairs(denoiser)
        start = load_start(self.plan.start, teacher.spec) if self.plan.start else None
        models = initial_weights(lambda: DistillationModels.from_teacher(denoiser, self.recipe, start), self.recipe.loop.seed)
        batches = self._batches(config.batch) if self.recipe.needs_discriminator else None
        stage = DistillationStage(models, self.recipe, self.fabric, batches, self.plan.reward, pairs)
        return self._train(stage, spec, "generator")

    def report(self) -> None:
        """Write the report unless it is up to date. A failure is only logged, because training is finished by then."""
        wanted = self.recipe.loop.report and self.fabric.is_global_zero
        if not wanted or report_is_current(self.run.folder):
            return
        # A picture that cannot be drawn must not make hours of training end in an error.
        try:
            write_report(self.run.folder, self.plan, self.evaluator, progress)
        except Exception as error:  # drawing, scoring and disks may raise anything
            file, name = self.run.folder / REPORT, type(error).__name__
            log.warning(
                "%s could not be written: %s: %s; the training is complete, run the same command again to write the report",
                file,
                name,
                error,
            )

    def _train(self, stage: Stage, spec: ModelSpec, name: str) -> Bundle:
        folder = self.run.folder / name

        def keep(scores: dict[str, float], images: np.ndarray) -> None:
            weights = {key: tensor.cpu().numpy() for key, tensor in stage.averages.primary.module.state_dict().items()}
            card = model_card(spec, self.recipe, self.dataset, scores)
            Bundle.write(folder, spec, weights, card, encode(contact_sheet(images)), reference=make_reference)

        best: Best = Loop(self.run, self.recipe.loop, self.fabric, spec, self.evaluator, keep)(stage)
        # A finished stage is not trained again, so a bundle that was removed cannot be written again.
        if not (folder / CONFIG).exists():
            raise RequestError(f"{folder} is missing, although its training is finished", remedy="train into another --out")
        log.info("%s: best after step %d: %s", name, best.step, best.scores)
        return self._named(Bundle.open(folder), spec.name, best.scores or {})

    def _named(self, bundle: Bundle, name: str, scores: dict[str, float]) -> Bundle:
        """The bundle with the recipe's name, which may have changed since the weights were written."""
        if bundle.spec.name == name:
            return bundle
        if self.fabric.is_global_zero:
            log.info("%s: now called '%s', before '%s'", bundle.path, name, bundle.spec.name)
            bundle.rename(name, model_card(dataclasses.replace(bundle.spec, name=name), self.recipe, self.dataset, scores))
        self.fabric.barrier()
        return Bundle.open(bundle.path)

    def _pairs(self, teacher: Denoiser) -> Pairs | None:
        objectives = [objective for objective in self.recipe.objectives if objective.regression_scale]
        if not objectives:
            return None
        file, count = self.run.folder / "state" / "pairs.safetensors", max(o.regression_pairs for o in objectives)
        # Rank 0 samples the pairs, then all ranks read the same file.
        if self.fabric.is_global_zero:
            teacher_pairs(file, teacher, count, self.recipe.teacher.steps, self.fabric.device)
        self.fabric.barrier()
        return teacher_pairs(file, teacher, count, self.recipe.teacher.steps, self.fabric.device)

    def _batches(self, batch: int) -> DataLoader:
        assert self.dataset is not None
        return DataLoader(self.dataset, batch, self.recipe.loop.seed)


def _class_counts(spec: ModelSpec, dataset: Dataset | None) -> dict[str, object]:
    """Number of images of each class in the data, for `generate --classes data`; empty if it is not known."""
    counts = class_counts(spec, dataset)
    return {} if counts is None else {"class_counts": counts.tolist()}


def _ancestry(teacher: Bundle) -> dict[str, object]:
    """The teacher's name and origin (hub, imported file), without paths of this machine."""
    source = {"hub": teacher.origin} if is_on_hub(teacher.origin) else {}
    imported = teacher.spec.provenance.get("imported")
    return {"name": teacher.spec.name, **source, **(imported if isinstance(imported, dict) else {})}
