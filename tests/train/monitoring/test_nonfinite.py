"""Updates that are not finite are skipped and counted; after a few in a row the run ends with term, noise level and advice."""

import json
import re
from pathlib import Path

import pytest
import torch

from builders.machine import call_cli
from uni_instruct.bundle import Bundle
from uni_instruct.errors import UniInstructError
from uni_instruct.train.pipeline import train as train_run
from uni_instruct.train.recipe import load_recipe

SETTINGS = [
    "method=di-star",
    "critic_updates=1",
    "distillation.batch=16",
    "distillation.duration_kimg=0.192",
    "critic_warmup_kimg=0",
    "metric=none",
    "loop.samples=16",
    "log_kimg=0.016",
]
# Of real images only, so that the trial on grey ones passes.
REWARDS = """
import torch

calls = 0

def always(images, class_ids):
    return images.mean(dim=(1, 2, 3)) * (float("nan") if images.detach().std() > 0 else 1)

def every_third(images, class_ids):
    global calls
    calls += images.detach().std() > 0
    return images.mean(dim=(1, 2, 3)) * (float("inf") if calls and calls % 3 == 0 else 1)

def gradient(images, class_ids):
    worst = images.amax(dim=(1, 2, 3))
    return torch.where(images.detach().std() > 0, (worst - worst.detach()).abs().sqrt(), images.mean(dim=(1, 2, 3)))
"""


def train(out: Path, teacher: Path, reward: str, *overrides: str) -> tuple[int, str, list[dict]]:
    (out.parent / "rewards.py").write_text(REWARDS)
    given = [f"teacher.bundle={teacher}", *SETTINGS, f"reward={out.parent}/rewards.py:{reward}", *overrides]
    done = call_cli("train", "digits", "--out", str(out), *[word for one in given for word in ("--set", one)])
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    return done.returncode, done.stderr, [json.loads(line) for line in lines]


def test_run_goes_on_without_the_updates_that_are_not_finite(digits_teacher: Path, tmp_path: Path) -> None:
    code, errors, records = train(tmp_path / "run", digits_teacher, "every_third")
    assert code == 0, errors
    skipped = [record["skipped_steps"] for record in records if "skipped_steps" in record]
    assert skipped == [step // 3 for step in range(1, 13)]
    weights = Bundle.open(tmp_path / "run" / "generator").weights()
    assert all(torch.from_numpy(array).isfinite().all() for array in weights.values())
    optimizer = torch.load(tmp_path / "run" / "state" / "generator.pt", weights_only=True)["stage"]["generator"]["optimizer"]
    assert optimizer["state"][0]["step"] == 12 - 4, "a skipped update leaves the moments alone"


def test_run_ends_after_a_few_in_a_row(digits_teacher: Path, tmp_path: Path) -> None:
    code, errors, records = train(tmp_path / "run", digits_teacher, "always", "bad_steps_in_a_row=4")
    assert code == 1
    assert re.search(
        r"error: reward is NaN or infinite at noise level [\d.e+-]+ in 4 updates in a row, the last in step 4; "
        r"make the reward finite for every image, or lower objective.reward_scale, and run again",
        errors,
    )
    assert [record["step"] for record in records] == [1, 2, 3]


def test_gradient_that_is_not_finite_under_a_finite_loss_is_caught(digits_teacher: Path, tmp_path: Path) -> None:
    code, errors, _ = train(tmp_path / "run", digits_teacher, "gradient")
    assert code == 1
    assert (
        "error: gradient is NaN or infinite in 5 updates in a row, the last in step 5; clip the gradient (distillation."
        in errors
    )


@pytest.mark.parametrize(
    ("section", "key", "term", "own"),
    [
        ("distillation", "critic_learning_rate", "fake_score", ()),
        ("teacher", "learning_rate", "teacher", ("teacher.bundle=", "teacher.duration_kimg=1.28", "network.model_channels=8")),
    ],
    ids=["critic", "teacher"],
)
def test_diverging_network_is_named(
    digits_teacher: Path, tmp_path: Path, section: str, key: str, term: str, own: tuple[str, ...]
) -> None:
    """A rate that no recipe may have, so that networks diverge within a few steps."""
    recipe = load_recipe(
        "digits",
        [f"teacher.bundle={digits_teacher}", "method=sid", *[one for one in SETTINGS if not one.startswith("method")], *own],
    )
    object.__setattr__(getattr(recipe, section), key, 1e25)
    with pytest.raises(UniInstructError) as caught:
        train_run(recipe, tmp_path / "run")
    assert caught.value.exit_code == 1
    assert re.search(rf"^{term} is NaN or infinite at noise level [\d.e+-]+ in 5 updates in a row", str(caught.value))
    assert f"lower {section}.{key}" in str(caught.value)
