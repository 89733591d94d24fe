"""However a global batch is divided, among processes or into micro-batches, the gradient is that of the whole batch.

How many processes there are where nobody says, and what they do together beside training.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor

from builders.machine import call_cli, run_cli
from uni_instruct.errors import RequestError
from uni_instruct.train.optimization import distributed
from uni_instruct.train.optimization.distributed import BatchShard, check_batches, processes_for
from uni_instruct.train.recipe import load_recipe
from uni_instruct.train.run_lock import read_run_process

# Two steps of everything that couples the images of a batch: ratios of mean 1, running means per bin, adversarial and
# regression terms. A large Adam epsilon keeps the first step from blowing rounding errors up to the size of the learning rate.
SETTINGS = [
    "method=f-distill",
    "critic_updates=1",
    "regression_scale=0.1",
    "regression_pairs=32",
    "teacher.steps=4",
    "distillation.batch=32",
    "distillation.duration_kimg=0.064",
    "critic_warmup_kimg=0",
    "distillation.decay_kimg=0",
    "adam_eps=1e-2",
    "critic_learning_rate=1e-2",
    "metric=none",
    "loop.samples=16",
    "log_kimg=0.032",
    "loop.report=false",
]
WAYS = {
    "micro-batches": (["distillation.micro_batch=5"], []),
    "two processes": ([], ["--devices", "2"]),
    "both": (["distillation.micro_batch=7"], ["--devices", "2"]),
}


def train(out: Path, teacher: Path, *overrides: str, options: tuple[str, ...] = ()) -> dict:
    """The stage's state after the run."""
    sets = [word for override in (f"teacher.bundle={teacher}", *SETTINGS, *overrides) for word in ("--set", override)]
    call = run_cli if options else call_cli  # several processes are started by one of their own
    done = call("train", "digits", "--out", str(out), *sets, *options)
    assert done.returncode == 0, done.stderr
    return torch.load(out / "state" / "generator.pt", weights_only=True)["stage"]


def gradient(state: dict, network: str) -> Tensor:
    """Of the last step: with beta1 = 0 it is Adam's first moment."""
    moments = state[network]["optimizer"]["state"]
    return torch.cat([moments[index]["exp_avg"].flatten() for index in sorted(moments)]).double()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits_teacher: Path) -> Callable[[str], dict]:
    """Trained with the whole batch at once, in one process, once per family."""
    folder = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda family: train(folder / family, digits_teacher, f"family={family}"))


@pytest.mark.parametrize(
    ("family", "way"),
    [
        ("expanded", "micro-batches"),
        ("integral", "both"),
        pytest.param("expanded", "two processes", marks=pytest.mark.slow),
        pytest.param("integral", "two processes", marks=pytest.mark.slow),
        pytest.param("integral", "micro-batches", marks=pytest.mark.slow),
        pytest.param("expanded", "both", marks=pytest.mark.slow),
    ],
)
def test_division_of_the_batch_does_not_change_the_gradient(
    whole: Callable[[str], dict], digits_teacher: Path, tmp_path: Path, family: str, way: str
) -> None:
    overrides, options = WAYS[way]
    expected = whole(family)
    state = train(tmp_path / "run", digits_teacher, f"family={family}", *overrides, options=tuple(options))
    for network in ("generator", "critic"):
        truth = gradient(expected, network)
        assert truth.norm() > 1e-3
        assert (gradient(state, network) - truth).norm() < 2e-5 * truth.norm(), network
    torch.testing.assert_close(state["ratio"]["running"], expected["ratio"]["running"], rtol=1e-5, atol=1e-6)
    assert (state["ratio"]["running"] != 1).any()


def test_each_process_takes_its_part_of_a_batch_that_they_divide() -> None:
    second = cast(Fabric, SimpleNamespace(world_size=2, global_rank=1))
    shard = BatchShard(second, batch=64, micro_batch=24)
    assert (shard.whole, shard.micro_batches) == (slice(32, 64), [slice(32, 56), slice(56, 64)])


@pytest.mark.parametrize("setting", ["teacher.batch=100", "distillation.batch=100", "teacher.batch=1"])
@pytest.mark.parametrize("processes", [3, 7, 64])
def test_a_batch_that_does_not_divide_is_named_and_both_ways_out_work(setting: str, processes: int) -> None:
    even = [f"{section}.batch={3 * 7 * 64}" for section in ("teacher", "distillation")]
    recipe, (key, batch) = load_recipe("digits", [*even, setting]), setting.split("=")
    with pytest.raises(RequestError, match=rf"{key} {batch} cannot be divided among {processes} processes") as refused:
        check_batches(recipe, processes)
    found = re.fullmatch(r"--set (\S+), or --devices (\d+)", refused.value.remedy)
    assert found
    check_batches(load_recipe("digits", [*even, found[1]]), processes)
    check_batches(recipe, int(found[2]))


def test_the_batch_of_a_teacher_that_is_given_is_not_asked_for() -> None:
    check_batches(load_recipe("digits", ["teacher.batch=1", "teacher=somewhere", "distillation.batch=6"]), 3)


@pytest.mark.slow
def test_torchrun_starts_the_processes_as_well(digits_teacher: Path, tmp_path: Path) -> None:
    ours = train(tmp_path / "ours", digits_teacher, options=("--devices", "2"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "uni_instruct"]
    sets = [word for override in (f"teacher.bundle={digits_teacher}", *SETTINGS) for word in ("--set", override)]
    command = [*launcher, "train", "digits", "--out", str(tmp_path / "theirs"), *sets]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "theirs" / "state" / "generator.pt", weights_only=True)["stage"]
    assert torch.equal(gradient(ours, "generator"), gradient(theirs, "generator"))
    assert done.stdout.count("generator:") == 1, "only the first process speaks"

    dry = subprocess.run([*command, "--dry-run", "--json"], capture_output=True, text=True, timeout=200)
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout)["images"]["generator"] == 64


@pytest.mark.parametrize(
    ("cores", "overrides", "processes"),
    [
        (1, [], 1),
        (2, [], 2),
        (4, ["teacher.batch=64", "distillation.batch=64"], 4),
        (6, ["teacher.batch=96", "distillation.batch=64"], 4),  # what divides both, with 16 images each
        (64, ["teacher.batch=64", "distillation.batch=64"], 4),
        (4, ["teacher.batch=63", "distillation.batch=64"], 1),
        (4, ["teacher.batch=8", "distillation.batch=8"], 1),
        (4, ["teacher.duration_kimg=10", "distillation.duration_kimg=9.9"], 1),
    ],
)
def test_a_cpu_trains_with_a_process_for_each_core(
    monkeypatch: pytest.MonkeyPatch, cores: int, overrides: list[str], processes: int
) -> None:
    monkeypatch.setattr(distributed, "usable_cpus", lambda: cores)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = load_recipe("digits", overrides)
    assert processes_for(recipe) == processes
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert processes_for(recipe) == 1
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert processes_for(recipe) == 7


@pytest.mark.slow
def test_processes_that_nobody_asked_for_make_the_samples_of_one(tmp_path: Path) -> None:
    sets = ["teacher.duration_kimg=0.512", "teacher.steps=4", "loop.samples=400", "precision=32-true", "metric=FD"]
    pictures = []
    for cores in ("1", "2"):
        out = tmp_path / cores
        command = ("train", "digits", "--teacher-only", "--out", out, *sets)
        done = run_cli(*command, env={**os.environ, "OMP_NUM_THREADS": cores})
        assert done.returncode == 0, done.stderr
        worker = read_run_process(out)
        assert worker is not None
        assert worker.devices == min(int(cores), len(os.sched_getaffinity(0)))
        pictures.append(np.asarray(Image.open(sorted((out / "samples").glob("teacher-*.png"))[-1])).astype(int))
    assert np.abs(pictures[1] - pictures[0]).max() <= 1
