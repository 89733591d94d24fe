"""A patched network in training: as teacher, as start, in what a run would cost, and learning."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from builders.bundles import random_bundle
from builders.plans import TINY, tiny_plan
from uni_instruct.bundle import Bundle
from uni_instruct.errors import RequestError
from uni_instruct.networks.build import PATCHES, build_denoiser, load_denoiser
from uni_instruct.networks.flops import count_flops
from uni_instruct.train.dry_run.cost import count_parameters, models_on_meta
from uni_instruct.train.dry_run.trial import StepCounter, distillation_stage, teacher_stage
from uni_instruct.train.optimization.distributed import start_fabric
from uni_instruct.train.plan import make_plan
from uni_instruct.train.recipe import load_recipe
from uni_instruct.train.rng import step_rng


@pytest.fixture(scope="module")
def patched_teacher(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("bundles") / "teacher", seed=8, image_shape=(1, 8, 8), steps=4, patch=2)


def test_a_start_of_another_patch_is_refused(patched_teacher: Bundle, tmp_path: Path) -> None:
    other = random_bundle(tmp_path / "other", seed=9, image_shape=(1, 8, 8))
    given = f"teacher.bundle={patched_teacher.path}"
    with pytest.raises(RequestError, match=r"has network.patch 1, the teacher 2; give a generator with the same network as"):
        make_plan(load_recipe("digits", [*TINY, given, f"distillation.start={other.path}"]))


def test_a_start_of_equal_weights_but_other_images_is_refused(patched_teacher: Bundle, tmp_path: Path) -> None:
    """What a patched network is fed are also images: 4x4, of four channels. Their weights have the same names and shapes."""
    args = {key: value for key, value in patched_teacher.spec.network_args.items() if key != "patch"}
    spec = dataclasses.replace(patched_teacher.spec, noise_shape=(4, 4, 4), steps=1, network_args=args)
    twin = Bundle.write(tmp_path / "twin", spec, patched_teacher.weights(), card="# twin\n")
    load_denoiser(twin)
    with pytest.raises(RequestError, match=r"has noise_shape \(4, 4, 4\), the teacher \(1, 8, 8\)"):
        make_plan(load_recipe("digits", [*TINY, f"teacher.bundle={patched_teacher.path}", f"distillation.start={twin.path}"]))


def test_a_given_teacher_brings_its_patch(patched_teacher: Bundle) -> None:
    plan = make_plan(load_recipe("digits", [*TINY, f"teacher.bundle={patched_teacher.path}"]))
    assert build_denoiser(plan.teacher_spec).patch == 2
    stage = distillation_stage(plan, start_fabric(1, "32-true"), plan.recipe.objective, False, 2)
    critic = stage.critic.module
    assert [network.patch for network in (stage.student.module, critic.fake_score, stage.averages.primary.module)] == [2] * 3


@pytest.mark.parametrize("patch", PATCHES)
def test_flops_are_those_of_a_network_at_the_coarser_resolution(patch: int) -> None:
    """One level without resampling: every convolution is at H / patch x W / patch, every other matrix serves one image."""
    plan = tiny_plan(f"network.patch={patch}", "attn_resolutions=[]")
    weights = {name: tensor.shape for name, tensor in build_denoiser(plan.teacher_spec).named_parameters()}
    pixels = (8 // patch) ** 2
    convolutions = sum(shape.numel() for shape in weights.values() if len(shape) == 4)
    linear = sum(shape.numel() for shape in weights.values() if len(shape) == 2)
    attention = 2 * pixels**2 * 16  # queries with keys, weights with values, in the one block that attends, of 16 channels
    counted = StepCounter(plan)
    assert counted.evaluation() == 2 * (pixels * convolutions + linear + attention)
    assert 2.8 < counted.teacher().flops / counted.evaluation() < 3
    assert count_parameters(models_on_meta(plan))["teacher"] == sum(shape.numel() for shape in weights.values())


def test_counts_without_storage_are_those_of_a_real_step() -> None:
    plan = tiny_plan("network.patch=2", "method=uni-instruct", "loop.precision=bf16-mixed", "loop.channels_last=true")
    counts = StepCounter(plan).distillation(plan.recipe.objective, False)
    stage = distillation_stage(plan, start_fabric(1, "bf16-mixed"), plan.recipe.objective, False, 3)
    flops = count_flops(lambda: stage.step(0, step_rng(0, "generator", 0), False))
    assert flops / 3 == pytest.approx(counts.flops, rel=1e-9)


def test_a_patched_teacher_learns() -> None:
    long = ("teacher.warmup_kimg=0", "teacher.duration_kimg=1e3", "teacher.learning_rate=5e-3")
    stage = teacher_stage(tiny_plan("network.patch=2", "attn_resolutions=[4]", *long), start_fabric(1, "32-true"), 16)
    losses = [stage.step(index, step_rng(0, "teacher", index), True)["teacher/loss"].item() for index in range(40)]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10]), losses


@pytest.mark.parametrize("discriminator", ["shared", "own"])
def test_a_patched_generator_is_distilled(discriminator: str) -> None:
    """The gradient reaches the first and the last layer of generator, fake score and discriminator."""
    plan = tiny_plan(
        "network.patch=2",
        "attn_resolutions=[4]",
        "divergence=forward-kl",
        f"discriminator={discriminator}",
        "precision=bf16-mixed",
    )
    stage = distillation_stage(plan, start_fabric(1, "bf16-mixed"), plan.recipe.objective, False, 4)
    generator, critic = ({k: v.clone() for k, v in o.module.state_dict().items()} for o in (stage.student, stage.critic))
    for index in range(2):
        metrics = stage.step(index, step_rng(0, "generator", index), True)
    assert stage.skipped == 0
    assert all(np.isfinite(float(value)) for value in metrics.values())
    ends = ("model.enc.4x4_conv.weight", "model.dec.4x4_aux_conv.weight")
    names = [*ends, *(f"fake_score.{end}" for end in ends), "head.conv.weight"]
    names += ["own_encoder.model.enc.4x4_conv.weight"] if discriminator == "own" else []
    now = stage.student.module.state_dict() | stage.critic.module.state_dict()
    assert [name for name in names if torch.equal(now[name], (generator | critic)[name])] == []
