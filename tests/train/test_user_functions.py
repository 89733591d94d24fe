"""A user's own file in a whole run: it is executed once, and computes with the float32 that the recipe promises."""

import os
from pathlib import Path

import pytest
import torch

from uni_instruct.train.objective.user_functions import import_named
from uni_instruct.train.pipeline import train
from uni_instruct.train.recipe import load_recipe

# Notes down every execution of the file, every call of the divergence, and how GPUs were to convolve in calls of the reward.
OWN_FILE = """
import torch
from pathlib import Path

def note(what):
    with (Path(__file__).parent / "notes").open("a") as notes:
        notes.write(what + "\\n")

note("executed")

def f(r):
    return r * torch.log(r)

def reward(images, class_ids):
    note(torch.backends.cudnn.conv.fp32_precision)
    return images.mean(dim=(1, 2, 3))
"""
SETTINGS = [
    "teacher.steps=2",
    "distillation.batch=8",
    "distillation.duration_kimg=0.024",
    "critic_warmup_kimg=0",
    "critic_updates=1",
    "method=uni-instruct",
    "reward_scale=1",
    "metric=none",
    "loop.grid=1",
    "loop.report=false",
]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_executes_it_once_and_multiplies_as_its_precision_says(
    tmp_path: Path, digits_teacher: Path, precision: str
) -> None:
    file, before = tmp_path / "own.py", torch.backends.cudnn.conv.fp32_precision
    file.write_text(OWN_FILE)
    own = [f"teacher.bundle={digits_teacher}", f"divergence={file}:f", f"reward={file}:reward", f"precision={precision}"]
    train(load_recipe("digits", [*SETTINGS, "channels_last=false", *own]), tmp_path / "run")
    first, tried, *steps = (tmp_path / "notes").read_text().splitlines()
    assert (first, tried) == ("executed", before)  # the reward is tried before the run begins
    assert steps == ["ieee" if precision == "32-true" else before] * 3
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_a_file_that_was_changed_is_executed_anew(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    for number, time_ns in ((1, 10**9), (1, 10**9), (2, 2 * 10**9)):
        file.write_text(f"def f():\n    return {number}\n")
        os.utime(file, ns=(time_ns, time_ns))
        assert import_named(f"{file}:f", param="divergence")() == number
