"""A run from a teacher alone, without any data, and an average of its weights that was not kept during training."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from builders.machine import call_cli
from uni_instruct.bundle import Bundle

SETTINGS = [
    "data=",
    "metric=none",
    "method=sid",
    "critic_updates=1",
    "distillation.batch=16",
    "distillation.duration_kimg=0.32",
    "distillation.decay_kimg=0",
    "critic_warmup_kimg=0",
    "distillation.ema_power_std=[0.05,0.1]",
    "snapshot_kimg=0.08",
    "loop.samples=16",
    "grid=16",
]


@pytest.fixture(scope="module")
def run(digits_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    sets = [word for setting in (f"teacher.bundle={digits_teacher}", *SETTINGS) for word in ("--set", setting)]
    done = call_cli("train", "digits", "--out", out, *sets)
    assert done.returncode == 0, done.stderr
    return out


def test_teacher_alone_is_enough_for_the_reverse_kl(run: Path, digits_teacher: Path) -> None:
    generator, teacher = Bundle.open(run / "generator"), Bundle.open(digits_teacher)
    assert generator.spec.provenance["data"] == ""
    assert "from its teacher alone" in (run / "generator" / "README.md").read_text()
    moved = [np.abs(array - teacher.weights()[name]).max() for name, array in generator.weights().items()]
    assert max(moved) > 1e-3


def test_average_of_a_kept_width_is_the_kept_one(run: Path, tmp_path: Path) -> None:
    done = call_cli("average", run, "--std", "0.1", "--out", tmp_path / "average")
    assert done.returncode == 0, done.stderr
    average = Bundle.open(tmp_path / "average").weights()
    kept = load_file(run / "snapshots" / "generator" / "power-0.1-00000000.320kimg.safetensors")
    published = Bundle.open(run / "generator").weights()
    for name, array in kept.items():
        np.testing.assert_allclose(average[name], array, atol=1e-6)
    assert any(np.abs(average[name] - published[name]).max() > 1e-4 for name in kept)
    assert (tmp_path / "average" / "samples.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--std", "0.9"), "Invalid value for '--std': 0.9 is not in the range 0.005<=x<=0.28"),
        (("--std", "0.1", "--kimg", "5"), "time 5 kimg is not covered by the snapshots"),
        (("--std", "0.1", "--stage", "teacher"), "there is no bundle"),
    ],
)
def test_average_that_cannot_be_had_is_refused(run: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = call_cli("average", run, *arguments, "--out", tmp_path / "average")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr
    assert not (tmp_path / "average").exists()
