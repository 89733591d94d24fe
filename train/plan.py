"""Opens what a recipe names (data, teacher, start weights, reward) and checks that they fit together, before any training."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from uni_instruct import __version__
from uni_instruct.bundle import Bundle
from uni_instruct.checkpoints.import_bundle import open_or_import
from uni_instruct.class_map import match_classes, renumber_labels
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.errors import RequestError
from uni_instruct.networks.build import build_denoiser, load_denoiser
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.preconditioning import Preconditioning
from uni_instruct.spec import ModelSpec
from uni_instruct.train.config import Recipe
from uni_instruct.train.monitoring.trackers import check_trackers
from uni_instruct.train.objective.reward import Reward, open_reward
from uni_instruct.train.stages.augment import AUGMENT_LABELS


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe with its opened parts, which fit together. teacher_spec: of the given teacher, or of the one to be trained."""

    recipe: Recipe
    dataset: Dataset | None
    teacher_spec: ModelSpec
    given_teacher: Bundle | None
    start: Bundle | None
    reward: Reward | None


def make_plan(recipe: Recipe, classes: Sequence[str] = ()) -> Plan:
    """Open what the recipe names, and check it. classes: class names in the order in which a resumed run was started.

    Raises RequestError if the parts do not fit together.
    """
    # The cheapest check first, so that a missing package is reported before data is opened.
    check_trackers(recipe.loop.trackers)
    dataset = open_dataset(recipe.data) if recipe.data else None
    if dataset is not None:
        with suppress(RequestError):  # if classes were added or removed, check_same_data raises a better error later
            dataset = renumber_labels(dataset, classes, "the run")
    latents = dataset is not None and dataset.latents
    given = open_or_import(recipe.teacher.bundle, "teacher", latents) if recipe.teacher.bundle else None
    if given is not None:
        _check_is_teacher(given)
        spec = given.spec
        if dataset is not None:
            dataset = _fitted_to_teacher(given, dataset, recipe.needs_discriminator)
    else:
        assert dataset is not None, "Recipe checks this"
        spec = plan_teacher(recipe, dataset)
    _build_on_meta(spec)  # raises RequestError for invalid network arguments
    _check_classes(recipe, spec)
    if recipe.distillation.augment and spec.network_args.get("augment_dim", 0) != AUGMENT_LABELS:
        raise RequestError(
            "distillation.augment needs a teacher that was trained with augmentation labels",
            remedy="train one with teacher.augment, or --set distillation.augment=0",
            param="recipe",
        )
    return Plan(
        recipe=recipe,
        dataset=dataset,
        teacher_spec=spec,
        given_teacher=given,
        start=_open_start(recipe.distillation.start, spec) if recipe.distillation.start else None,
        reward=_open_rewards(recipe, spec),
    )


def plan_teacher(recipe: Recipe, dataset: Dataset) -> ModelSpec:
    """The spec of a teacher trained by this recipe on this data. Raises RequestError if it needs classes that are missing."""
    args, conditional = recipe.network.args, recipe.network.conditional
    if conditional and dataset.labels is None:
        raise RequestError(
            f"data set '{dataset.name}' has no classes{f' ({dataset.note})' if dataset.note else ''}",
            remedy="--set network.conditional=false",
            param="recipe",
        )
    if recipe.teacher.augment or recipe.distillation.augment:
        args["augment_dim"] = AUGMENT_LABELS
    return ModelSpec(
        name=f"{recipe.name}-teacher",
        noise_shape=dataset.image_shape,
        latents=dataset.latents,
        num_classes=dataset.num_classes if conditional else 0,
        class_names=dataset.class_names if conditional else (),
        sigma_init=recipe.distillation.sigma_init,
        steps=recipe.teacher.steps,
        network=recipe.network.architecture,
        network_args=args,
        provenance={"recipe": recipe.to_dict(), "data": dataset.source, "uni_instruct": __version__},
        licence=dataset.licence,
    )


def _open_start(source: str, teacher: ModelSpec) -> Bundle:
    bundle = open_or_import(source, "generator", teacher.latents)
    mine, theirs = bundle.spec, teacher
    match_classes(teacher.class_names, mine.class_names, "the teacher", f"distillation.start {source}")
    # The simple differences first, because their message is shorter than one with two lists of arguments.
    for what in ("noise_shape", "num_classes", "network"):
        if getattr(mine, what) != getattr(theirs, what):
            raise _unlike(source, what, getattr(mine, what), getattr(theirs, what))
    networks = [_build_on_meta(spec) for spec in (mine, theirs)]
    patches = [network.patch for network in networks]
    if patches[0] != patches[1]:
        raise _unlike(source, "network.patch", *patches)
    # Weights are compared rather than arguments: dropout may differ, and a default may be given or left out.
    if _weights_of(networks[0]) != _weights_of(networks[1]):
        raise _unlike(source, "network_args", dict(mine.network_args), dict(theirs.network_args))
    return bundle


def load_start(start: Bundle, teacher: ModelSpec) -> Denoiser:
    """The denoiser with the weights that the generator starts from, and its classes in the teacher's order."""
    denoiser = load_denoiser(start)
    whose = f"distillation.start {start.path}"
    ids = match_classes(teacher.class_names, start.spec.class_names, "the teacher", whose)
    if ids is not None:
        denoiser.renumber_classes(ids)
    return denoiser


def _unlike(source: str, what: str, mine: object, theirs: object) -> RequestError:
    return RequestError(
        f"distillation.start {source} has {what} {mine}, the teacher {theirs}",
        remedy="give a generator with the same network as the teacher, or leave distillation.start out",
        param="start",
    )


def _build_on_meta(spec: ModelSpec) -> Denoiser:
    # On the meta device tensors have shapes but no storage, so that a network of any size is built fast.
    with torch.device("meta"):
        return build_denoiser(spec)


def _weights_of(denoiser: Denoiser) -> tuple[Preconditioning, dict[str, torch.Size]]:
    return denoiser.preconditioning, {name: tensor.shape for name, tensor in denoiser.state_dict().items()}


def _open_rewards(recipe: Recipe, spec: ModelSpec) -> Reward | None:
    names = {objective.reward for objective in recipe.objectives if objective.reward_scale}
    # Only one reward is supported, because a reward's network may fill half of a GPU.
    if len(names) > 1:
        problem = f"the phases of the recipe name {len(names)} different rewards, but a run can use only one"
        raise RequestError(problem, remedy="give all phases the same reward", param="reward")
    return open_reward(names.pop(), spec.image_shape, spec.num_classes) if names else None


def _check_classes(recipe: Recipe, spec: ModelSpec) -> None:
    guided = any(o.teacher_guidance != 1 or o.fake_guidance != 1 or o.fake_training_guidance != 1 for o in recipe.objectives)
    if guided and not spec.num_classes:
        raise RequestError(
            "classifier-free guidance needs a teacher with classes, but this one has none",
            remedy="set teacher_guidance, fake_guidance and fake_training_guidance to 1",
            param="recipe",
        )


def _check_is_teacher(bundle: Bundle) -> None:
    if bundle.spec.steps == 1:
        raise RequestError(
            f"teacher {bundle.path} is a one-step generator, not a diffusion model: it denoises from one noise level only",
            remedy="give the teacher that it was distilled from, or start from it with distillation.start",
            param="teacher",
        )


def _fitted_to_teacher(teacher: Bundle, dataset: Dataset, needs_labels: bool) -> Dataset:
    """The data set with its classes in the teacher's order; unchanged if the training does not use its labels."""
    if teacher.spec.noise_shape != dataset.image_shape:
        raise RequestError(
            f"teacher {teacher.path} makes images of shape {list(teacher.spec.noise_shape)}, "
            f"data set '{dataset.name}' holds {list(dataset.image_shape)}",
            remedy="give the data that the teacher was trained on",
            param="teacher",
        )
    # If the labels are not used, the classes need not match.
    if not needs_labels or not teacher.spec.num_classes:
        return dataset
    if dataset.num_classes:  # names are compared before numbers, because their error says which classes differ
        dataset = renumber_labels(dataset, teacher.spec.class_names, f"teacher {teacher.path}")
    if teacher.spec.num_classes != dataset.num_classes:
        raise RequestError(
            f"teacher {teacher.path} has {teacher.spec.num_classes} classes, data set '{dataset.name}' {dataset.num_classes}",
            remedy="give the data that the teacher was trained on",
            param="teacher",
        )
    return dataset
