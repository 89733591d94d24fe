"""The inputs of the report's sections: a run's folder, opened once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch

from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine, open_engine
from uni_instruct.evaluate import Evaluator
from uni_instruct.networks.build import build_denoiser
from uni_instruct.spec import ModelSpec
from uni_instruct.train.monitoring.clock import Times, read_times
from uni_instruct.train.plan import Plan, make_plan
from uni_instruct.train.recipe import parse_recipe, read_yaml
from uni_instruct.train.report.neighbours import QUERIES
from uni_instruct.train.report.pictures import DrawnImages, Grid, draw_rows, plan_grid
from uni_instruct.train.report.records import Evaluation, StageHistory, read_history
from uni_instruct.train.report.scores import SetScores, samples_of_a_set, score_sets

Json: TypeAlias = "str | int | float | Sequence[Json] | Mapping[str, Json] | None"
TEACHER_BUDGET_S = 20.0  # time limit for drawing the teacher's grid, and for the student's samples


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportInputs:
    """A finished run, as the sections read it. What several sections need is computed once and cached.

    pictures: folder for the report's pictures. evaluator: None if the recipe's metric is none, or without data.
    """

    folder: Path
    pictures: Path
    plan: Plan
    evaluator: Evaluator | None
    history: dict[str, StageHistory]
    times: Times
    generator: Bundle
    teacher: Bundle
    facts: dict[str, Json] = field(default_factory=dict)  # what the sections measure, for report.json

    @property
    def spec(self) -> ModelSpec:
        """The generator's spec."""
        return self.generator.spec

    @property
    def makes_pictures(self) -> bool:
        """Whether the generator makes pictures; False for latents of a VAE without its decoder."""
        return self.spec.makes_pictures

    @property
    def parameters(self) -> int:
        """Number of parameters of the generator's network. The teacher has the same architecture."""
        # Built on the meta device, because the weights are not needed to count them.
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build_denoiser(self.spec).parameters())

    def best(self, stage: str) -> Evaluation | None:
        """The stage's evaluation whose weights were kept; None if nothing was scored."""
        return self.history[stage].best(self.plan.recipe.loop.metric) if stage in self.history else None

    @cached_property
    def student_engine(self) -> Engine:
        """The generator's published weights, as `generate --engine torch` runs them."""
        return open_engine(self.generator, "torch")

    @cached_property
    def teacher_engine(self) -> Engine:
        """The teacher with its many-step sampler."""
        return open_engine(self.teacher, "torch")

    @cached_property
    def grid(self) -> Grid:
        """The seeds and classes of the grid that shows teacher and student."""
        return plan_grid(self.spec)

    @cached_property
    def teacher_images(self) -> DrawnImages:
        """The teacher's images of as many rows of the grid as TEACHER_BUDGET_S allows."""
        return draw_rows(self.teacher_engine, self.grid, TEACHER_BUDGET_S)

    @cached_property
    def student_scores(self) -> SetScores | None:
        """The student's scores, on seeds by which no weights were chosen; None without an evaluator."""
        loop = self.plan.recipe.loop
        if self.evaluator is None:
            return None
        return score_sets(self.evaluator, self.student_engine, loop.metric, samples_of_a_set(loop.samples), None)

    @cached_property
    def samples(self) -> DrawnImages:
        """The student's images of seeds from 0 on, for the search of neighbours. The grid shows the first of them."""
        return draw_rows(self.student_engine, plan_grid(self.spec, QUERIES), TEACHER_BUDGET_S)


def open_run(folder: Path, pictures: Path, plan: Plan | None, evaluator: Evaluator | None) -> ReportInputs:
    """Open a finished run. plan and evaluator are opened here unless they are passed, which saves time.

    Raises RequestError if the run is not finished, or if something that its recipe names no longer exists.
    """
    plan = plan or make_plan(parse_recipe(read_yaml(folder / "recipe.yaml")))
    if evaluator is None and plan.dataset is not None and plan.recipe.loop.metric != "none":
        evaluator = Evaluator(plan.dataset, plan.recipe.loop.extractor)
    return ReportInputs(
        folder=folder,
        pictures=pictures,
        plan=plan,
        evaluator=evaluator,
        history=read_history(folder),
        times=read_times(folder),
        generator=Bundle.open(folder / "generator"),
        teacher=plan.given_teacher or Bundle.open(folder / "teacher"),
    )
