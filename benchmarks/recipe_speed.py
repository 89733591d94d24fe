"""How fast a recipe trains, against what it was before: `python benchmarks/training.py --recipe fashion-mnist [--busy]`.

Both recipes' stages take the trainer's own steps on random images of the data's shape, in turns, round by round. The speed of a
distillation is that of its phases, each for its share of the images, without the critic's warm-up. With `busy` every round is
taken twice, alone and beside a process that spins. What the command line does for a training's process (threads that sleep,
memory that is kept) and the fused Adam serve both recipes here, so the ratio is the recipes' own.
"""

import dataclasses
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric
from machine import time_of

from uni_instruct.data.dataset import ArrayReader, Dataset
from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.train.config import PhaseConfig, Recipe
from uni_instruct.train.loop import Stage
from uni_instruct.train.optimization.auto_precision import resolve_precision
from uni_instruct.train.optimization.distributed import start_fabric
from uni_instruct.train.plan import plan_teacher
from uni_instruct.train.recipe import load_recipe
from uni_instruct.train.rng import initial_weights, step_rng
from uni_instruct.train.stages.data_loader import DataLoader
from uni_instruct.train.stages.distillation import DistillationModels, DistillationStage
from uni_instruct.train.stages.teacher import TeacherStage

FORMER = Path(__file__).parent / "former"
SHAPES = {"fashion-mnist": (1, 28, 28)}
CLASSES, IMAGES = 10, 1024
SPIN = "while True: pass"
SPIN_STARTS_S = 0.5


@dataclass
class Work:
    """Steps of a stage under one objective, for that share of the stage's images; seconds of each by how the machine was."""

    recipe: str
    stage: Stage
    share: float = 1.0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._steps = itertools.count()
        self.step()  # warms up

    def step(self) -> None:
        """The stage's next."""
        index = next(self._steps)
        self.stage.step(index, step_rng(0, self.stage.name, index), False)


def compare_recipes(name: str, rounds: int, busy: bool) -> dict[str, object]:
    """Images a second of both stages of today's recipe and the former one, and their ratio: medians over the rounds."""
    dataset = random_dataset(SHAPES[name])
    today = load_recipe(name)
    loop = resolve_precision(today.loop, plan_teacher(today, dataset), today.teacher.batch)
    recipes = {"former": load_recipe(str(FORMER / f"{name}.yaml")), "today": dataclasses.replace(today, loop=loop)}
    works = [work for label, recipe in recipes.items() for work in works_of(label, recipe, dataset)]
    conditions = ("idle", "busy") if busy else ("idle",)
    for _, condition in itertools.product(range(rounds), conditions):
        with spinning_process() if condition == "busy" else nullcontext():
            for work in works:
                work.seconds.setdefault(condition, []).append(time_of(work.step))
    speeds = {
        condition: {stage: row(works, stage, condition) for stage in ("teacher", "generator")} for condition in conditions
    }
    result: dict[str, object] = {
        "recipe": name,
        "rounds": rounds,
        "loops": {k: loop_of(r) for k, r in recipes.items()},
        **speeds,
    }
    if busy:
        result["busy_over_idle"] = {
            stage: {label: round(speeds["busy"][stage][label] / speeds["idle"][stage][label], 2) for label in recipes}
            for stage in ("teacher", "generator")
        }
    return result


def works_of(label: str, recipe: Recipe, dataset: Dataset) -> list[Work]:
    """The teacher's training, then each phase of the distillation."""
    fabric, spec = start_fabric(1, recipe.loop.precision), plan_teacher(recipe, dataset)

    def network() -> Denoiser:
        return initial_weights(lambda: build_denoiser(spec), recipe.loop.seed)

    teacher = TeacherStage(network(), DataLoader(dataset, recipe.teacher.batch, recipe.loop.seed), recipe, fabric)
    total = recipe.distillation.duration_kimg
    edges = [0.0, *(phase.until_kimg for phase in recipe.schedule), total]
    phases = [*recipe.schedule, PhaseConfig(until_kimg=total, objective=recipe.objective)]
    shares = [(end - start) / total for start, end in itertools.pairwise(edges)]
    stages = [phase_stage(network(), recipe, phase, dataset, fabric) for phase in phases]
    return [Work(label, teacher), *(Work(label, stage, share) for stage, share in zip(stages, shares, strict=True))]


def phase_stage(teacher: Denoiser, recipe: Recipe, phase: PhaseConfig, dataset: Dataset, fabric: Fabric) -> DistillationStage:
    """The distillation under that phase's objective from its first step on."""
    models = DistillationModels.from_teacher(teacher, recipe)
    config = dataclasses.replace(recipe.distillation, critic_warmup_kimg=0.0)
    alone = dataclasses.replace(recipe, objective=phase.objective, schedule=(), distillation=config)
    batches = DataLoader(dataset, config.batch, recipe.loop.seed) if recipe.needs_discriminator else None
    return DistillationStage(models, alone, fabric, batches)


def row(works: list[Work], stage: str, condition: str) -> dict[str, float]:
    """Images a second of either recipe in that stage, and how many times as many today's makes as the former."""
    per_image: dict[str, list[float]] = {}
    for label in dict.fromkeys(work.recipe for work in works):
        parts = [work for work in works if (work.recipe, work.stage.name) == (label, stage)]
        rounds = zip(*(work.seconds[condition] for work in parts), strict=True)
        per_image[label] = [
            sum(s * work.share / work.stage.batch for s, work in zip(times, parts, strict=True)) for times in rounds
        ]
    speeds = {label: round(1 / statistics.median(times), 1) for label, times in per_image.items()}
    ratios = [former / today for former, today in zip(per_image["former"], per_image["today"], strict=True)]
    return speeds | {"ratio": round(statistics.median(ratios), 2)}


def loop_of(recipe: Recipe) -> dict[str, object]:
    """What of the recipe concerns the arithmetic's speed, not its result."""
    loop = recipe.loop
    return {"precision": loop.precision, "channels_last": loop.channels_last, "compile": loop.compile}


def random_dataset(image_shape: tuple[int, int, int]) -> Dataset:
    """Random pixels in ten classes."""
    channels, height, width = image_shape
    random = np.random.default_rng(0)
    return Dataset(
        name="random",
        image_shape=image_shape,
        labels=np.arange(IMAGES, dtype=np.int64) % CLASSES,
        num_classes=CLASSES,
        class_names=tuple(map(str, range(CLASSES))),
        licence="",
        source="random",
        reader=ArrayReader(random.integers(0, 256, (IMAGES, height, width, channels), dtype=np.uint8)),
    )


@contextmanager
def spinning_process() -> Iterator[None]:
    """One other process that keeps a core busy."""
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        time.sleep(SPIN_STARTS_S)
        yield
    finally:
        process.kill()
        process.wait()
