"""A whole run: recipe -> teacher -> one-step generator, each left behind as a bundle."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
from lightning_fabric import Fabric

from uni_instruct import __version__
from uni_instruct.bundle import CONFIG, Bundle, GeneratorSpec
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate import Evaluator
from uni_instruct.images import contact_sheet, encode
from uni_instruct.networks.build import build_denoiser, load_denoiser
from uni_instruct.train.card import model_card
from uni_instruct.train.config import Recipe
from uni_instruct.train.distillation import DistillationStage
from uni_instruct.train.loop import Best, Loop, Stage
from uni_instruct.train.randomness import Batches, initial_weights
from uni_instruct.train.run import Run
from uni_instruct.train.teacher import TeacherStage

log = logging.getLogger(__name__)


def train(recipe: Recipe, out: Path) -> Bundle:
    """Trains what the recipe says, or goes on where an earlier call stopped; returns the generator's bundle.

    Raises RequestError, before anything is trained, where recipe, data and teacher do not fit each other.
    """
    dataset = open_dataset(recipe.data)
    teacher_spec = plan_teacher(recipe, dataset)
    build_denoiser(teacher_spec)
    given = Bundle.open(recipe.teacher.bundle) if recipe.teacher.bundle else None
    if given is not None:
        _check_teacher_fits(given, dataset)
    session = _Session(recipe, dataset, Run(out, recipe))
    return session.distil(given or session.train_teacher(teacher_spec))


def plan_teacher(recipe: Recipe, dataset: Dataset) -> GeneratorSpec:
    """The spec of a teacher trained by this recipe on this data."""
    args = dataclasses.asdict(recipe.network)
    architecture, conditional = args.pop("architecture"), args.pop("conditional")
    if conditional and dataset.labels is None:
        raise RequestError(
            f"data set '{dataset.name}' has no classes", remedy="--set network.conditional=false", param="recipe"
        )
    return GeneratorSpec(
        name=f"{recipe.name}-teacher",
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes if conditional else 0,
        class_names=dataset.class_names if conditional else (),
        sigma_init=recipe.distillation.sigma_init,
        steps=recipe.teacher.steps,
        network=architecture,
        network_args=args,
        provenance={"recipe": recipe.to_dict(), "data": dataset.source, "uni_instruct": __version__},
        licence=dataset.licence,
    )


class _Session:
    """What both stages of one call share."""

    def __init__(self, recipe: Recipe, dataset: Dataset, run: Run):
        self.recipe, self.dataset, self.run = recipe, dataset, run
        self.fabric = Fabric(accelerator="auto", devices=1, precision=recipe.loop.precision)  # type: ignore[arg-type]
        self.evaluator = None if recipe.loop.metric == "none" else Evaluator(dataset)

    def train_teacher(self, spec: GeneratorSpec) -> Bundle:
        """The teacher/ bundle, trained unless its state says that it is done."""
        denoiser = initial_weights(lambda: build_denoiser(spec), self.recipe.loop.seed)
        stage = TeacherStage(denoiser, self._batches(self.recipe.teacher.batch), self.recipe.teacher, self.fabric)
        return self._train(stage, spec, "teacher")

    def distil(self, teacher: Bundle) -> Bundle:
        """The generator/ bundle, distilled from the teacher."""
        config = self.recipe.distillation
        spec = dataclasses.replace(
            teacher.spec,
            name=self.recipe.name,
            steps=1,
            sigma_init=config.sigma_init,
            provenance={
                "recipe": self.recipe.to_dict(),
                "data": self.dataset.source,
                "teacher_sha256": teacher.weights_sha256,
                "uni_instruct": __version__,
            },
        )
        denoiser = load_denoiser(teacher)
        stage = DistillationStage(denoiser, self._batches(config.batch), config, self.fabric)
        return self._train(stage, spec, "generator")

    def _train(self, stage: Stage, spec: GeneratorSpec, name: str) -> Bundle:
        folder = self.run.folder / name

        def keep(scores: dict[str, float], images: np.ndarray) -> None:
            weights = {key: tensor.cpu().numpy() for key, tensor in stage.ema.module.state_dict().items()}
            card = model_card(spec, self.recipe, self.dataset, scores)
            Bundle.write(folder, spec, weights, card, encode(contact_sheet(images)))

        best: Best = Loop(self.run, self.recipe.loop, spec, self.evaluator, keep)(stage)
        if not (folder / CONFIG).exists():
            raise RequestError(f"{folder} is gone, but its training is finished", remedy="train into another --out")
        log.info("%s: best after step %d: %s", name, best.step, best.scores)
        return Bundle.open(folder)

    def _batches(self, batch: int) -> Batches:
        return Batches(self.dataset, batch, self.recipe.loop.seed)


def _check_teacher_fits(teacher: Bundle, dataset: Dataset) -> None:
    if teacher.spec.image_shape != dataset.image_shape:
        raise RequestError(
            f"teacher {teacher.path} makes images of shape {list(teacher.spec.image_shape)}, "
            f"data set '{dataset.name}' holds {list(dataset.image_shape)}",
            remedy="give the data that the teacher was trained on",
            param="teacher",
        )
    if teacher.spec.num_classes and teacher.spec.num_classes != dataset.num_classes:
        raise RequestError(
            f"teacher {teacher.path} has {teacher.spec.num_classes} classes, data set '{dataset.name}' {dataset.num_classes}",
            remedy="give the data that the teacher was trained on",
            param="teacher",
        )
