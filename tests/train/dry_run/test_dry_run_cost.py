"""The costs of `train --dry-run`: FLOPs, memory and time are those of the networks and steps that train."""

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from builders.plans import tiny_plan
from uni_instruct.bundle import Bundle
from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.flops import count_flops
from uni_instruct.train.dry_run.cost import cost_of, count_parameters, models_on_meta
from uni_instruct.train.dry_run.counting import SavedTensors
from uni_instruct.train.dry_run.trial import StepCounter, StepTimer, TrialLimits, distillation_stage, teacher_stage
from uni_instruct.train.optimization.distributed import start_fabric
from uni_instruct.train.stages.distillation import DistillationModels, DistillationStage


def test_flops_of_a_convolution_a_matrix_product_and_attention() -> None:
    image, kernel = torch.zeros(2, 3, 5, 7, requires_grad=True), torch.zeros(8, 3, 3, 3, requires_grad=True)
    forward = 2 * (2 * 8 * 5 * 7) * (3 * 9)
    assert count_flops(lambda: F.conv2d(image, kernel, padding=1)) == forward
    assert count_flops(lambda: F.conv2d(image, kernel, padding=1).sum().backward()) == 3 * forward
    assert count_flops(lambda: F.conv2d(image.detach(), kernel, padding=1).sum().backward()) == 2 * forward
    assert count_flops(lambda: torch.zeros(4, 5, device="meta") @ torch.zeros(5, 6, device="meta")) == 2 * 4 * 5 * 6
    q = torch.zeros(1, 1, 64, 16)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * (2 * 64 * 64 * 16)


def test_saved_tensors_are_counted_while_they_are_kept_and_weights_are_not() -> None:
    layer = nn.Linear(10, 20, bias=False)
    x = torch.zeros(4, 10)
    with SavedTensors([layer]) as saved:
        hidden = layer(x)  # keeps x
        loss = (hidden * hidden).sum()  # keeps hidden, twice the same storage
        assert saved.peak == 4 * (4 * 10 + 4 * 20)
        loss.backward()
        layer(x).square().sum().backward()  # no more than that, as the first was let go
    assert saved.peak == 4 * (4 * 10 + 4 * 20)


@pytest.mark.parametrize(
    ("changes", "alone", "trained", "evaluated"),
    [
        # The integral family differentiates no denoiser: generator and fake score are trained, teacher and fake score are read.
        (["method=diff-instruct", "critic_updates=3"], False, 4, 4),  # the others train the fake score on images of their own
        (["method=diff-instruct", "distillation.micro_batch=2"], False, 2, 3),  # the critic's images are made once more
        (["method=dmd", "fake_guidance=2"], False, 3, 3),
        (["method=sid"], True, 1, 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_steps_flops_are_those_of_its_trainings_and_evaluations(
    changes: list[str], alone: bool, trained: int, evaluated: int
) -> None:
    plan = tiny_plan(*changes)
    training, evaluation = flops_of_the_teacher()
    counted = StepCounter(plan).distillation(plan.recipe.objective, alone).flops
    assert counted == trained * training + evaluated * evaluation


def test_a_backward_pass_is_two_forward_passes_but_for_the_images_gradient() -> None:
    training, evaluation = flops_of_the_teacher()
    assert 2.9 < training / evaluation < 3


@cache
def flops_of_the_teacher() -> tuple[float, float]:
    """A training step's and an evaluation's, per image."""
    counted = StepCounter(tiny_plan())
    return counted.teacher().flops, counted.evaluation()


def test_a_rewards_flops_count(tmp_path: Path) -> None:
    (tmp_path / "product.py").write_text(
        "import torch\n\ndef reward(images, class_ids):\n    return (images.flatten(1) @ torch.ones(64, 50)).mean(1)\n"
    )
    plan = tiny_plan("method=diff-instruct", f"reward={tmp_path / 'product.py'}:reward", "reward_scale=1")
    training, evaluation = flops_of_the_teacher()
    counted = StepCounter(plan).distillation(plan.recipe.objective, False).flops
    assert counted == 2 * training + 2 * evaluation + 2 * (2 * 64 * 50)


@pytest.mark.parametrize(
    "changes",
    [
        ["method=f-distill", "discriminator=own", "critic_updates=1", "teacher_guidance=2", "network.dropout=0.1"],
        ["method=uni-instruct", "loop.precision=bf16-mixed"],
    ],
    ids=lambda changes: changes[0],
)
def test_counts_without_storage_are_those_of_a_real_step(changes: list[str]) -> None:
    plan = tiny_plan(*changes)
    counts = StepCounter(plan).distillation(plan.recipe.objective, False)
    fabric, kept = start_fabric(1, plan.recipe.loop.precision), {}
    for images in (3, 6):
        stage = distillation_stage(plan, fabric, plan.recipe.objective, False, images)
        step(stage)
        with SavedTensors([stage.student.module, stage.critic.module, stage.update_student.teacher]) as saved:
            flops = count_flops(lambda stage=stage: step(stage))
        kept[images] = saved.peak
        assert flops / stage.batch == pytest.approx(counts.flops, rel=1e-9)
    # What grows with the images: real mixed precision keeps copies of weights as well.
    assert (kept[6] - kept[3]) / 3 == pytest.approx(counts.activations, rel=0.01)


def step(stage: DistillationStage) -> None:
    stage.step(0, torch.Generator().manual_seed(0), False)


@pytest.mark.parametrize("changes", [["method=sid"], ["method=sida"], ["method=sida", "discriminator=own"]], ids=" ".join)
def test_parameters_are_those_of_the_networks(changes: list[str]) -> None:
    plan = tiny_plan(*changes)
    models = DistillationModels.from_teacher(build_denoiser(plan.teacher_spec), plan.recipe)
    added = [m for m in (models.critic.head, models.critic.own_encoder) if m is not None]
    assert count_parameters(models_on_meta(plan)) == {
        "generator": sum(p.numel() for p in models.student.parameters()),
        "fake_score": sum(p.numel() for p in models.critic.fake_score.parameters()),
        "discriminator": sum(p.numel() for m in added for p in m.parameters()),
        "teacher": sum(p.numel() for p in models.teacher.parameters()),
    }


def test_memory_is_what_a_stage_holds(tiny_teacher: Bundle) -> None:
    averages, given = "distillation.ema_power_std=[0.05, 0.1]", f"teacher.bundle={tiny_teacher.path}"
    plan = tiny_plan("method=sida", averages, given, "distillation.batch=6")
    memory = cost_of(plan, budget_s=0).generator.memory
    stage = distillation_stage(plan, start_fabric(1, "32-true"), plan.recipe.objective, False, 6)
    step(stage)
    with SavedTensors([stage.student.module, stage.critic.module, stage.update_student.teacher]) as saved:
        step(stage)
    assert memory.activations == pytest.approx(saved.peak, rel=0.01)
    networks = [stage.student.module, stage.critic.module, stage.update_student.teacher]
    assert memory.weights == sum(t.nbytes for n in networks for t in (*n.parameters(), *n.buffers()))
    assert memory.averages == sum(t.nbytes for n in stage.averages.modules().values() for t in (*n.parameters(), *n.buffers()))
    states = [s for o in (stage.student, stage.critic) for s in o.optimizer.state.values()]
    assert memory.moments == sum(s[name].nbytes for s in states for name in ("exp_avg", "exp_avg_sq"))
    assert memory.gradients == max(sum(p.nbytes for p in n.parameters()) for n in networks)


@pytest.mark.parametrize(
    ("limits", "images"),
    [
        (TrialLimits(images=5, fixed_bytes=0, bytes_per_image=1, budget_s=1e9), 5),
        (TrialLimits(images=5, fixed_bytes=0, bytes_per_image=1, budget_s=0), 0),
        (TrialLimits(images=5, fixed_bytes=2**60, bytes_per_image=1, budget_s=1e9), 0),
    ],
    ids=["free", "no time", "no memory"],
)
def test_steps_are_timed_within_time_and_memory(limits: TrialLimits, images: int) -> None:
    plan = tiny_plan("method=sid")
    flops = StepCounter(plan).evaluation()
    timed = StepTimer(plan, flops, weights_bytes=1)
    timing, twice = (timed.distillation(plan.recipe.objective, False, f, limits) for f in (flops, 2 * flops))
    assert timing is not None
    assert twice is not None
    assert (timing.images, twice.images) == (images, images)
    if not images:  # scaled from one evaluation, which these FLOPs are
        assert (timing.s_per_image, twice.s_per_image) == (timed.evaluation_s, 2 * (timed.evaluation_s or 0))
    assert StepTimer(plan, flops, weights_bytes=2**60).teacher(flops, limits) is None


def test_accumulated_steps_are_timed_with_their_accumulation() -> None:
    plan = tiny_plan("teacher.micro_batch=2")
    fabric = start_fabric(1, "32-true")
    assert len(teacher_stage(plan, fabric, 2).shard.micro_batches) == 2
    assert len(teacher_stage(tiny_plan(), fabric, 2).shard.micro_batches) == 1
