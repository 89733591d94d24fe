"""What the sections of a report are made from: a run's folder, opened once."""

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
from uni_instruct.train.report.pictures import Drawn, Grid, draw_rows, plan_grid
from uni_instruct.train.report.records import Evaluation, StageHistory, read_history
from uni_instruct.train.report.scores import SetScores, samples_of_a_set, score_sets

Json: TypeAlias = "str | int | float | Sequence[Json] | Mapping[str, Json] | None"
TEACHER_BUDGET_S = 20.0  # for the teacher's grid; the student's has as many rows


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportInputs:
    """A finished run. pictures is where the report's pictures are put; evaluator is None where the metric is none."""

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
        """The generator's."""
        return self.generator.spec

    @property
    def makes_pictures(self) -> bool:
        """Whether images can be looked at: latents of a VAE cannot."""
        return self.spec.makes_pictures

    @property
    def parameters(self) -> int:
        """Of the generator's network, which the teacher shares."""
        # Counted, not loaded: the weights are not needed for their number.
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in build_denoiser(self.spec).parameters())

    def best(self, stage: str) -> Evaluation | None:
        """The stage's evaluation whose weights were kept; None where nothing was scored."""
        return self.history[stage].best(self.plan.recipe.loop.metric) if stage in self.history else None

    @cached_property
    def student_engine(self) -> Engine:
        """The published weights, as `generate --engine torch` runs them."""
        return open_engine(self.generator, "torch")

    @cached_property
    def teacher_engine(self) -> Engine:
        """The teacher with its many-step sampler."""
        return open_engine(self.teacher, "torch")

    @cached_property
    def grid(self) -> Grid:
        """The noise and classes that teacher and student are shown with."""
        return plan_grid(self.spec)

    @cached_property
    def teacher_drawn(self) -> Drawn:
        """The teacher's images of as many rows of the grid as are affordable."""
        return draw_rows(self.teacher_engine, self.grid, TEACHER_BUDGET_S)

    @cached_property
    def student_scores(self) -> SetScores | None:
        """The student's, on seeds that no weights were chosen by; None where the recipe's metric is none."""
        loop = self.plan.recipe.loop
        if self.evaluator is None:
            return None
        return score_sets(self.evaluator, self.student_engine, loop.metric, samples_of_a_set(loop.samples), None)

    @cached_property
    def samples(self) -> Drawn:
        """The student's images of seeds 0.., whose neighbours are looked for: more than the grid shows."""
        return draw_rows(self.student_engine, plan_grid(self.spec, QUERIES), TEACHER_BUDGET_S)


def open_run(folder: Path, pictures: Path, plan: Plan | None, evaluator: Evaluator | None) -> ReportInputs:
    """Opens what a run left behind; plan and evaluator where they are at hand already, as opening them takes time.

    Raises RequestError where the run is not finished, or what its recipe names is gone.
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
