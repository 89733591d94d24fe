"""`make gpu` goes its whole way on a CPU, so that it does not fail of a typo where a GPU is lent for ten minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_part_of_the_script_gives_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--smallest", "--out", str(tmp_path / "gpu.json")]
    # Run as a file: Python must look for the modules that lie beside it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert figures == json.loads(done.stdout)
    assert figures["problems"] == []
    expected = {"onnx-fp32 CPUExecutionProvider", "onnx-fp16 CPUExecutionProvider", "torch-fp32", "torch-bf16", "torch-fp16"}
    assert {row["engine"] for row in figures["speed"]} == expected
    assert expected <= {row["engine"] for row in figures["parity"]}
    assert all(row["images_per_s"] > 0 for row in figures["speed"])
    assert [row["exit_code"] for row in figures["training"]] == [0]


def test_without_a_gpu_it_says_so() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, str(SCRIPT), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment | {"CUDA_VISIBLE_DEVICES": ""})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: device cuda was asked for, and this process sees no CUDA device; "
        "use --device cpu; with a GPU in the machine, check nvidia-smi and CUDA_VISIBLE_DEVICES\n"
    )
