"""The experiments of a lab: each variant of the objective with each seed, each with its own recipe and folder."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uni_instruct.errors import RequestError
from uni_instruct.train.config import LoopConfig, Recipe
from uni_instruct.train.objective.methods import METHODS
from uni_instruct.train.optimization.auto_precision import resolve_precision_for_run
from uni_instruct.train.plan import make_plan
from uni_instruct.train.recipe import load_recipe
from uni_instruct.train.recipe_keys import one_of
from uni_instruct.train.run_lock import refuse_foreign
from uni_instruct.train.scoring_choice import announce, announce_note, choose_scoring

TEACHER_RUN, EXPERIMENTS = "teacher-run", "experiments"
# No report for each experiment: it takes a minute, and the lab's page replaces it. The user's settings can override this.
WITHOUT_REPORT = ("loop.report=false",)
MAX_EXPERIMENTS = 1000


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A published method with changed settings: `sid alpha=0.5` is the method sid with objective.alpha 0.5."""

    method: str
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The variant as on the command line, which is also its name in tables."""
        return " ".join((self.method, *self.settings))

    @property
    def folder(self) -> str:
        """The name as part of a path: letters, digits, dots, plus signs and dashes."""
        return re.sub(r"[^A-Za-z0-9.+-]+", "-", self.name).strip("-")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A variant trained with one seed (loop.seed). folder: the folder of its run."""

    variant: Variant
    seed: int
    folder: Path
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A lab: all experiments of one folder. teacher: the recipe of the teacher's run; None if the recipe gives a teacher."""

    folder: Path
    teacher: Recipe | None
    experiments: tuple[Experiment, ...]

    @property
    def teacher_run(self) -> Path:
        """The folder of the run that trains the teacher."""
        return self.folder / TEACHER_RUN

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Each variant once, in the order of the command line."""
        return tuple(dict.fromkeys(experiment.variant for experiment in self.experiments))


def parse_variants(methods: Sequence[str]) -> tuple[Variant, ...]:
    """The variants of `--methods`: comma-separated names, each followed by its settings, if any.

    Raises RequestError for an unknown method, a setting without a value, or a variant given twice.
    """
    found = [part.split() for text in methods for part in text.split(",") if part.strip()]
    if not found:
        raise RequestError("--methods names no method", remedy=f"give some of {', '.join(METHODS)}", param="methods")
    for name, *settings in found:
        one_of("--methods", name, METHODS)
        for setting in settings:
            if "=" not in setting:
                problem = f"--methods: '{setting}' after '{name}' has no value"
                raise RequestError(problem, remedy="write key=value, and a comma before the next method", param="methods")
    variants = [Variant(method=name, settings=tuple(settings)) for name, *settings in found]
    for variant in variants:
        if variants.count(variant) > 1:
            raise RequestError(f"--methods has '{variant.name}' twice", remedy="give each once", param="methods")
    return tuple(variants)


def plan_lab(recipe: str, changes: Sequence[str], variants: Sequence[Variant], seeds: Sequence[int], folder: Path) -> Lab:
    """The lab's experiments. recipe and changes are as in `train`, and the same for all experiments.

    Raises RequestError if a variant's recipe is invalid, if there are too many experiments, or if the metric is none.
    """
    if len(seeds) * len(variants) > MAX_EXPERIMENTS:
        problem = f"{len(variants)} methods with {len(seeds)} seeds are more than {MAX_EXPERIMENTS} trainings"
        raise RequestError(problem, remedy="give fewer methods or seeds", param="seeds")
    refuse_foreign(folder, ("report",), EXPERIMENTS)
    base = load_recipe(recipe, (*WITHOUT_REPORT, *changes))
    if base.loop.metric == "none":
        raise RequestError("a lab compares scores, but loop.metric is none", remedy="leave loop.metric out", param="set")
    given = base.teacher.bundle
    bundle = given or str((folder / TEACHER_RUN / "teacher").absolute())
    experiments = []
    for variant in variants:
        own = load_recipe(recipe, (*WITHOUT_REPORT, *changes, f"method={variant.method}", *variant.settings))
        for seed in dict.fromkeys(seeds):
            made = dataclasses.replace(
                own,
                name=base.name,
                teacher=dataclasses.replace(own.teacher, bundle=bundle),
                loop=dataclasses.replace(own.loop, seed=seed),
            )
            experiments.append(
                Experiment(
                    variant=variant, seed=seed, folder=folder / EXPERIMENTS / f"{variant.folder}-seed{seed}", recipe=made
                )
            )
    return Lab(folder=folder, teacher=None if given else base, experiments=tuple(experiments))


def resolve_lab(lab: Lab) -> Lab:
    """The lab with every `auto` of its recipes resolved once, so that all experiments use the same precision and score.

    Raises RequestError, before anything is trained, if data, teacher, reward and a variant do not fit together.
    """
    first: LoopConfig | None = None
    for variant in lab.variants:
        recipe = next(experiment.recipe for experiment in lab.experiments if experiment.variant == variant)
        if lab.teacher is not None:  # the teacher's bundle does not exist yet, so the plan must not open it
            recipe = dataclasses.replace(recipe, teacher=lab.teacher.teacher)
        plan = make_plan(recipe)
        if first is None:
            scoring = choose_scoring(recipe.loop, plan.dataset)
            announce_note(plan.dataset)
            announce(scoring, recipe.loop)
            images = recipe.distillation.micro_batch or recipe.distillation.batch
            first = resolve_precision_for_run(scoring.loop, plan.teacher_spec, images, lab.folder)
    assert first is not None, "a lab has an experiment"
    experiments = [dataclasses.replace(t, recipe=_with_resolved_auto(t.recipe, first)) for t in lab.experiments]
    return dataclasses.replace(
        lab, experiments=tuple(experiments), teacher=lab.teacher and _with_resolved_auto(lab.teacher, first)
    )


def _with_resolved_auto(recipe: Recipe, answers: LoopConfig) -> Recipe:
    """The recipe with the keys that may be `auto` replaced by those in answers."""
    loop = dataclasses.replace(
        recipe.loop,
        precision=answers.precision,
        channels_last=answers.channels_last,
        metric=answers.metric,
        extractor=answers.extractor,
    )
    return dataclasses.replace(recipe, loop=loop)
