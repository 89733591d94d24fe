"""What a lab trains: each variant of the objective with each seed, as a recipe of its own in a folder of its own."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uni_instruct.errors import RequestError
from uni_instruct.train.config import LoopConfig, Recipe
from uni_instruct.train.judging import announce, announce_note, choose_judge
from uni_instruct.train.objective.methods import METHODS
from uni_instruct.train.optimization.auto_precision import settle_for_run
from uni_instruct.train.plan import make_plan
from uni_instruct.train.recipe import load_recipe
from uni_instruct.train.recipe_keys import one_of

TEACHER_RUN, EXPERIMENTS = "teacher-run", "experiments"
# The lab's own page says more than a report of each experiment would, which takes a minute; the user's settings go on top.
WITHOUT_REPORT = ("loop.report=false",)
MOST_EXPERIMENTS = 1000


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A published method with changes on top: `sid alpha=0.5` is the method sid with objective.alpha 0.5."""

    method: str
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As it is written on the command line, and in tables."""
        return " ".join((self.method, *self.settings))

    @property
    def folder(self) -> str:
        """A name for its folders: letters, digits, dots, dashes."""
        return re.sub(r"[^A-Za-z0-9.+-]+", "-", self.name).strip("-")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A variant trained with one seed; seed is loop.seed, folder that of its run."""

    variant: Variant
    seed: int
    folder: Path
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class Lab:
    """All experiments of one folder. teacher is the recipe of the run that trains it, None where the recipe gives one."""

    folder: Path
    teacher: Recipe | None
    experiments: tuple[Experiment, ...]

    @property
    def teacher_run(self) -> Path:
        """The folder of the run that trains the teacher."""
        return self.folder / TEACHER_RUN

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Each once, in their order."""
        return tuple(dict.fromkeys(experiment.variant for experiment in self.experiments))


def parse_variants(methods: Sequence[str]) -> tuple[Variant, ...]:
    """Variants of `--methods`: names between commas, each with settings after it if any.

    Raises RequestError for an unknown method, a setting without a value, a variant given twice.
    """
    found = [part.split() for text in methods for part in text.split(",") if part.strip()]
    if not found:
        raise RequestError("--methods names none", remedy=f"give some of {', '.join(METHODS)}", param="methods")
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
    """The lab's experiments. recipe, changes: as `train` takes them, and the same for all.

    Raises RequestError where a variant's recipe is refused, or distillation would be scored by nothing.
    """
    if len(seeds) * len(variants) > MOST_EXPERIMENTS:
        problem = f"{len(variants)} methods with {len(seeds)} seeds are more than {MOST_EXPERIMENTS} trainings"
        raise RequestError(problem, remedy="ask for fewer", param="seeds")
    base = load_recipe(recipe, (*WITHOUT_REPORT, *changes))
    if base.loop.metric == "none":
        raise RequestError("a lab compares scores, and loop.metric is none", remedy="leave loop.metric out", param="set")
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


def settled(lab: Lab) -> Lab:
    """The lab with everything opened once and every `auto` answered once, so that all experiments use the same arithmetic.

    Raises RequestError, before anything is trained, where data, teacher, reward and a variant do not fit each other.
    """
    first: LoopConfig | None = None
    for variant in lab.variants:
        recipe = next(experiment.recipe for experiment in lab.experiments if experiment.variant == variant)
        if lab.teacher is not None:  # its bundle is yet to be trained
            recipe = dataclasses.replace(recipe, teacher=lab.teacher.teacher)
        plan = make_plan(recipe)
        if first is None:
            judge = choose_judge(recipe.loop, plan.dataset)
            announce_note(plan.dataset)
            announce(judge, recipe.loop)
            images = recipe.distillation.micro_batch or recipe.distillation.batch
            first = settle_for_run(judge.loop, plan.teacher_spec, images, lab.folder)
    assert first is not None, "a lab has an experiment"
    experiments = [dataclasses.replace(t, recipe=_as_answered(t.recipe, first)) for t in lab.experiments]
    return dataclasses.replace(lab, experiments=tuple(experiments), teacher=lab.teacher and _as_answered(lab.teacher, first))


def _as_answered(recipe: Recipe, answers: LoopConfig) -> Recipe:
    """The recipe with those answers to what may be `auto`."""
    loop = dataclasses.replace(
        recipe.loop,
        precision=answers.precision,
        channels_last=answers.channels_last,
        metric=answers.metric,
        extractor=answers.extractor,
    )
    return dataclasses.replace(recipe, loop=loop)
