"""Distillation step by step, in this process: which terms a method has, what each does, and when a phase begins."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from uni_instruct.bundle import Bundle
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.data.dataset import ArrayReader, number_names
from uni_instruct.networks.build import load_denoiser
from uni_instruct.train.objective.guidance import NO_CLASS, drop_classes, guided
from uni_instruct.train.objective.methods import METHODS
from uni_instruct.train.objective.pairs import teacher_pairs
from uni_instruct.train.recipe import load_recipe
from uni_instruct.train.rng import step_rng
from uni_instruct.train.stages.data_loader import DataLoader
from uni_instruct.train.stages.distillation import DistillationModels, DistillationStage

SETTINGS = [
    "teacher.bundle=digits",
    "critic_updates=1",
    "distillation.batch=16",
    "distillation.duration_kimg=1.6",
    "distillation.decay_kimg=0",
    "critic_warmup_kimg=0",
    "teacher.steps=4",
    "regression_pairs=16",
]
# Terms beside the divergence's own.
FURTHER_TERMS = {
    "dmd": {"regression"},
    "dmd2": {"adversarial"},
    "f-distill": {"adversarial"},
    "sida": {"adversarial"},
    "di++": {"reward"},
    "di-star": {"reward"},
    "uni-instruct": {"adversarial"},
}
INTEGRAL = {"diff-instruct", "dmd", "dmd2", "f-distill", "di++"}


def brightness(images: Tensor, class_ids: Tensor | None) -> Tensor:
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def reward(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text("def brightness(images, class_ids):\n    return images.mean(dim=(1, 2, 3))\n")
    return f"{tmp_path}/rewards.py:brightness"


def stage_of(tmp_path: Path, *overrides: str, dataset: Dataset | None = None) -> DistillationStage:
    recipe = load_recipe("digits", [*SETTINGS, *overrides])
    teacher = load_denoiser(Bundle.open("digits"))
    fabric = Fabric(accelerator="cpu", devices=1)
    needs_pairs = any(objective.regression_scale for objective in recipe.objectives)
    pairs = teacher_pairs(tmp_path / "pairs.safetensors", teacher, 16, 4, fabric.device) if needs_pairs else None
    data = (dataset or open_dataset("digits")) if recipe.needs_discriminator else None
    batches = DataLoader(data, recipe.distillation.batch, 0) if data else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = DistillationModels.from_teacher(teacher, recipe)
    return DistillationStage(models, recipe, fabric, batches, brightness, pairs)


def run(stage: DistillationStage, steps: range) -> list[dict[str, float]]:
    return [
        {name: float(value) for name, value in stage.step(index, step_rng(0, "generator", index), True).items()}
        for index in steps
    ]


def terms_in(metrics: dict[str, float]) -> set[str]:
    return {
        name
        for name in ("integral", "di", "fgm", "sim", "adversarial", "regression", "reward")
        if f"generator/{name}" in metrics
    }


@pytest.mark.parametrize("method", METHODS)
def test_method_has_its_terms_and_moves_the_generator(tmp_path: Path, reward: str, method: str) -> None:
    stage = stage_of(tmp_path, f"method={method}", f"reward={reward}")
    before = [parameter.detach().clone() for parameter in stage.student.module.parameters()]
    metrics = run(stage, range(1))[0]
    divergence = {"integral"} if method in INTEGRAL else {"di", "fgm", "sim"}
    assert terms_in(metrics) == divergence | FURTHER_TERMS.get(method, set())
    # h'' = 0 for both KLs, and FGM vanishes with alpha = 1 or with the forward KL's h = r.
    still = {"di", "fgm"} if stage.recipe.objective.alpha == 1 or method == "uni-instruct" else {"di"}
    for term in terms_in(metrics) - {"regression"}:
        assert (metrics[f"generator/{term}_gradient"] > 0) == (term not in still), term
    assert ("discriminator/loss" in metrics) == (method in {"dmd2", "f-distill", "sida", "uni-instruct"})
    assert ("ratio/q50" in metrics) == stage.recipe.objective.needs_ratio
    assert any(not torch.equal(old, new) for old, new in zip(before, stage.student.module.parameters(), strict=True))


def test_warm_up_and_phases_begin_where_the_recipe_says(tmp_path: Path) -> None:
    schedule = "schedule=[{until_kimg: 0.064, objective: {method: sid}}, {until_kimg: 0.096, objective: {method: sida}}]"
    stage = stage_of(tmp_path, schedule, "critic_warmup_kimg=0.032", "method=dmd2", "critic_updates=1")
    found = [terms_in(metrics) for metrics in run(stage, range(8))]
    expanded = {"di", "fgm", "sim"}
    assert found == [set()] * 2 + [expanded] * 2 + [expanded | {"adversarial"}] * 2 + [{"integral", "adversarial"}] * 2


def test_warm_up_leaves_the_generator_alone(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, "critic_warmup_kimg=1")
    before = {name: tensor.clone() for name, tensor in stage.student.module.state_dict().items()}
    critic = {name: tensor.clone() for name, tensor in stage.critic.module.state_dict().items()}
    run(stage, range(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.student.module.state_dict().items())
    assert any(not torch.equal(tensor, critic[name]) for name, tensor in stage.critic.module.state_dict().items())


def test_regression_alone_learns_the_teachers_images(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, "method=dmd", "divergence_scale=0", "regression_scale=1", "generator_learning_rate=1e-3")
    losses = [metrics["generator/regression"] for metrics in run(stage, range(40))]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_reward_alone_is_climbed(tmp_path: Path, reward: str) -> None:
    stage = stage_of(tmp_path, "method=di-star", "divergence_scale=0", "reward_scale=2", f"reward={reward}")
    losses = [metrics["generator/reward"] for metrics in run(stage, range(40))]
    assert losses[-1] < losses[0] - 0.5
    assert losses[-1] == pytest.approx(-2 * brightness(stage.sample(*some_inputs(stage)), None).mean().item(), abs=0.5)


def test_guidance_is_the_straight_line_through_both_predictions() -> None:
    def denoiser(x: Tensor, sigma: Tensor, class_ids: Tensor) -> Tensor:
        return x * (class_ids == NO_CLASS).float()[:, None, None, None] + class_ids[:, None, None, None]

    x, sigma, class_ids = torch.rand(3, 1, 2, 2), torch.ones(3, 1, 1, 1), torch.tensor([0, 1, 2])
    without, with_class = x - 1, class_ids[:, None, None, None].expand(3, 1, 2, 2).float()
    for scale in (0.0, 1.0, 1.5):
        expected = without + scale * (with_class - without)
        torch.testing.assert_close(guided(denoiser, x, sigma, class_ids, scale), expected)


def test_guidance_of_one_is_none_and_costs_none(tmp_path: Path) -> None:
    plain = run(stage_of(tmp_path, "method=sid"), range(1))[0]
    ones = ["teacher_guidance=1", "fake_guidance=1", "fake_training_guidance=1"]
    assert run(stage_of(tmp_path, "method=sid-lsg", *ones), range(1))[0] == plain
    assert run(stage_of(tmp_path, "method=sid-lsg"), range(1))[0] != plain


def test_share_of_classes_is_hidden() -> None:
    class_ids = torch.randint(10, (20_000,), generator=torch.Generator().manual_seed(0))
    hidden = drop_classes(class_ids, 0.1, torch.Generator().manual_seed(1))
    assert (hidden == NO_CLASS).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(hidden[hidden >= 0], class_ids[hidden >= 0])
    assert drop_classes(class_ids, 0.0, torch.Generator()) is class_ids


def test_rare_classes_count_as_much_as_frequent_ones(tmp_path: Path) -> None:
    digits = open_dataset("digits")
    index = np.concatenate([np.flatnonzero(digits.labels == label)[: 150 if label == 3 else 15] for label in range(10)])
    skewed = Dataset(
        name="skewed",
        image_shape=digits.image_shape,
        labels=digits.labels[index],
        num_classes=10,
        class_names=number_names(10),
        licence="",
        source="",
        reader=ArrayReader(digits.images(index)),
    )
    weights = stage_of(tmp_path, "divergence=jeffreys", dataset=skewed).update_critic.class_weights
    counted = torch.bincount(torch.from_numpy(skewed.labels)) * weights / len(skewed)
    torch.testing.assert_close(counted, torch.full((10,), 0.1))


def some_inputs(stage: DistillationStage) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(5)
    return torch.randn(64, *stage.image_shape, generator=rng), torch.randint(10, (64,), generator=rng)
