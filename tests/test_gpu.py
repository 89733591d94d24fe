"""What only a GPU can show; without one each test skips with its reason."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_cli

from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.generate import generate, resolve_class_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_torch_makes_the_same_images_on_gpu_and_cpu(tiny_bundle: Bundle, tmp_path: Path) -> None:
    seeds = range(32)
    engine = open_engine(tiny_bundle, "torch")
    assert engine.device == "cuda"
    on_gpu = generate(engine, seeds, resolve_class_ids(engine.spec, seeds))
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    arguments = ("generate", tiny_bundle.path, "--seeds", "0-31", "--engine", "torch", "--out", tmp_path / "cpu.npz")
    assert run_cli(*arguments, env=without_gpu).returncode == 0
    on_cpu = np.load(tmp_path / "cpu.npz")["arr_0"]
    assert np.abs(on_gpu.astype(int) - on_cpu.astype(int)).max() <= 1


def test_training_runs_on_the_gpu(tmp_path: Path) -> None:
    short = ("teacher.duration_kimg=1", "distillation.duration_kimg=1", "divergence=forward-kl", "loop.samples=64")
    arguments = [word for setting in short for word in ("--set", setting)]
    done = run_cli("train", "digits", "--out", tmp_path / "run", *arguments)
    assert done.returncode == 0, done.stderr
    assert Bundle.open(tmp_path / "run" / "generator").spec.steps == 1
