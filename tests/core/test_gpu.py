"""What only a GPU can show; without one each test skips with its reason."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from builders.bundles import ONNX
from builders.machine import run_cli
from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.engines.onnxruntime import OnnxEngine
from uni_instruct.engines.outputs import TOLERANCES, agreement
from uni_instruct.engines.torch import TorchEngine
from uni_instruct.errors import RequestError
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.networks.float32 import full_float32
from uni_instruct.noise import draw_inputs, round_robin_class_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_torch_makes_the_same_images_on_gpu_and_cpu(tiny_bundle: Bundle, tmp_path: Path) -> None:
    seeds = range(32)
    engine = open_engine(tiny_bundle, "torch")
    assert engine.device == "cuda:0"
    on_gpu = generate_images(engine, seeds, resolve_class_ids(engine.spec, seeds))
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    arguments = ("generate", tiny_bundle.path, "--seeds", "0-31", "--engine", "torch", "--out", tmp_path / "cpu.npz")
    assert run_cli(*arguments, env=without_gpu).returncode == 0
    on_cpu = np.load(tmp_path / "cpu.npz")["arr_0"]
    assert np.abs(on_gpu.astype(int) - on_cpu.astype(int)).max() <= 1


def test_torchs_graphs_give_any_batch_from_any_thread(tiny_bundle: Bundle) -> None:
    """Batches that are padded and split, replayed from several threads, against the CPU."""
    on_gpu, on_cpu = (open_engine(tiny_bundle, "torch", device=device) for device in ("cuda", "cpu"))
    calls = [
        draw_inputs(on_cpu.spec, range(count), round_robin_class_ids(on_cpu.spec, count)) for count in (1, 3, 64, 65, 130) * 3
    ]
    with ThreadPoolExecutor(4) as pool:
        for found, call in zip(pool.map(lambda call: on_gpu.outputs(*call), calls), calls, strict=True):
            assert not agreement([found], on_cpu.outputs(*call).images).problem(TOLERANCES["fp32"])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_torch_in_16_bits_keeps_its_tolerance(tiny_bundle: Bundle, precision: str) -> None:
    inputs = draw_inputs(tiny_bundle.spec, range(16), round_robin_class_ids(tiny_bundle.spec, 16))
    truth = TorchEngine(tiny_bundle).outputs(*inputs)
    found = TorchEngine(tiny_bundle, device="cuda:0", precision=precision).outputs(*inputs)
    assert not agreement([found], truth.images).problem(TOLERANCES[precision])


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"])
def test_onnx_runtime_runs_on_the_provider_that_was_asked_for(exported_bundle: Bundle, provider: str) -> None:
    stored = exported_bundle.engines()[ONNX]
    try:
        engine = OnnxEngine(exported_bundle, stored, device="cuda:0", provider=provider)
    except RequestError as error:  # another build of ONNX Runtime; what it says is tested without a GPU
        pytest.skip(str(error))
    reference = exported_bundle.reference()
    assert reference is not None
    found = [engine.outputs(reference.noise(engine.spec), reference.class_ids) for _ in range(3)]  # captured, and replayed
    assert not agreement(found, reference.images).problem(TOLERANCES["fp32"])


def test_full_float32_convolves_as_a_cpu_does() -> None:
    rng = torch.Generator().manual_seed(0)
    images, filters = torch.randn(4, 64, 16, 16, generator=rng), torch.randn(64, 64, 3, 3, generator=rng)
    truth = torch.conv2d(images.double(), filters.double())
    with full_float32():
        made = torch.conv2d(images.cuda(), filters.cuda()).cpu().double()
    assert (made - truth).abs().max() < 1e-5 * truth.abs().max()  # TF32 is wrong by some 1e-3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_training_runs_on_the_gpu(digits_teacher: Path, tmp_path: Path, precision: str) -> None:
    state = train(tmp_path / "run", digits_teacher, f"precision={precision}")
    assert Bundle.open(tmp_path / "run" / "generator").spec.steps == 1
    for name in ("generator", "critic"):
        assert all(tensor.isfinite().all() for tensor in state[name]["module"].values())
        assert bool(state[name]["scaler"]) == (precision == "16-mixed")
        assert state[name]["bad"] == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_the_gradient_of_one(digits_teacher: Path, tmp_path: Path) -> None:
    one, two = train(tmp_path / "one", digits_teacher), train(tmp_path / "two", digits_teacher, options=("--devices", "2"))
    for name in ("generator", "critic"):
        for key, tensor in one[name]["module"].items():
            torch.testing.assert_close(two[name]["module"][key], tensor, rtol=1e-3, atol=1e-4)


def train(out: Path, teacher: Path, *overrides: str, options: tuple[str, ...] = ()) -> dict:
    """The state of a short distillation of the shipped digits."""
    short = (f"teacher.bundle={teacher}", "distillation.duration_kimg=1", "critic_warmup_kimg=0", "divergence=jeffreys")
    sets = [word for setting in (*short, "loop.samples=64", *overrides) for word in ("--set", setting)]
    done = run_cli("train", "digits", "--out", out, *sets, *options)
    assert done.returncode == 0, done.stderr
    state: dict = torch.load(out / "state" / "generator.pt", weights_only=True, map_location="cpu")["stage"]
    return state
