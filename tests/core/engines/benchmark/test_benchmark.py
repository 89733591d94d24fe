"""`uni-instruct benchmark`: every engine in one table, what is chosen afterwards, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from PIL import Image

from builders.bundles import ONNX, random_bundle
from uni_instruct.bundle import Bundle
from uni_instruct.engine import TORCH, engine_status, resolve_engines, select_engine
from uni_instruct.engines.benchmark import comparison, peak
from uni_instruct.engines.record import RECORD, EngineId, EngineRecord
from uni_instruct.system.files import sha256

Cli = Callable[..., tuple[int, str, str]]
QUICK = ("--rounds", "2", "--seconds", "0.001")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(peak.PEAK_IMAGES, "cpu", 1)  # so that it takes milliseconds
    return tmp_path / "cache" / "uni-instruct" / "engines"


@pytest.fixture
def bundle(exported_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(exported_bundle.path, tmp_path / "bundle"))


def test_every_engine_beside_eager_and_the_peak(bundle: Bundle, cli: Cli, tmp_path: Path) -> None:
    arguments = ("benchmark", bundle.path, "--batches", "16,1", *QUICK, "--json", "--plot", tmp_path / "speed.png")
    code, output, errors = cli(*arguments)
    assert code == 0, errors
    found = json.loads(output)
    assert [(row["engine"], row["batch"]) for row in found["rows"]] == [
        (engine, batch) for batch in (1, 16) for engine in ("eager fp32", "onnx-fp32", "torch-fp32")
    ]
    for row in found["rows"]:
        speed = row["images_per_s"]
        assert 0 < speed["low"] <= speed["median"] <= speed["high"]
        assert row["latency_ms"] == pytest.approx(1e3 * row["batch"] / speed["median"])
        assert row["share_of_peak"] > 0
        assert row["device"] == "cpu"
    assert [row["to_eager"] for row in found["rows"] if row["engine"] == "eager fp32"] == [1.0, 1.0]
    assert found["flops_per_image"] > 1e5
    (peak,) = found["peaks"].values()
    assert peak["gflops_per_s_low"] <= peak["gflops_per_s"] <= peak["gflops_per_s_high"]
    assert found["weights_sha256"] == bundle.weights_sha256
    assert found["command"].startswith("uni-instruct benchmark ")
    assert {"onnxruntime", "torch", "numpy"} <= set(found["versions"])
    assert found["machine"]["cpus_usable"] >= 1
    assert errors.splitlines()[0] == "check engines: 0/2 engines"  # before anything takes time
    with Image.open(tmp_path / "speed.png") as picture:
        assert picture.size == (1050, 675)


def test_what_is_measured_is_counted_by_engine_and_not_by_word(bundle: Bundle) -> None:
    assert resolve_engines(bundle, (), None) == [ONNX, TORCH]
    assert resolve_engines(bundle, ("torch", "torch-fp32"), None) == [TORCH]
    compiled = EngineId("torch", "fp32", "compiled")
    assert resolve_engines(bundle, (str(compiled), "onnx"), None) == [ONNX, compiled]


def test_afterwards_the_fastest_is_chosen_however_small_its_lead(bundle: Bundle, cli: Cli, cache: Path) -> None:
    """A trial's figures need a lead of a quarter; those of one benchmark none."""
    assert json.loads(cli("benchmark", bundle.path, "--batches", "2,64", *QUICK, "--json")[1])["chosen"]
    notes = {path.name.rpartition("-")[0]: path for path in cache.glob("*.json")}
    assert set(notes) == {"onnx-fp32", "torch-fp32"}
    values = {name: json.loads(path.read_text()) for name, path in notes.items()}
    assert values["onnx-fp32"]["benchmark"] == values["torch-fp32"]["benchmark"] != ""
    assert values["onnx-fp32"]["relative_l2"] < 1e-5  # what the trial found is kept
    for fastest, slowest in (("torch-fp32", "onnx-fp32"), ("onnx-fp32", "torch-fp32")):
        notes[fastest].write_text(json.dumps(values[fastest] | {"images_per_s": 101.0}))
        notes[slowest].write_text(json.dumps(values[slowest] | {"images_per_s": 100.0}))
        assert str(select_engine(bundle).engine_id) == fastest
    # One of them from elsewhere, or from a trial: a small lead is none.
    notes["onnx-fp32"].write_text(json.dumps(values["onnx-fp32"] | {"images_per_s": 100.0, "benchmark": ""}))
    notes["torch-fp32"].write_text(json.dumps(values["torch-fp32"] | {"images_per_s": 101.0}))
    assert select_engine(bundle).engine_id == ONNX


def test_the_speed_at_the_batch_next_to_a_trials_is_noted(bundle: Bundle, cli: Cli) -> None:
    found = json.loads(cli("benchmark", bundle.path, "--batches", "1,12,64", *QUICK, "--json")[1])
    (row,) = [row for row in found["rows"] if row["engine"] == "onnx-fp32" and row["batch"] == 12]
    assert engine_status(bundle, ONNX).facts()["images_per_s"] == row["images_per_s"]["median"]


def test_a_part_of_the_engines_changes_nothing(bundle: Bundle, cli: Cli) -> None:
    before = select_engine(bundle)
    found = json.loads(cli("benchmark", bundle.path, "--batches", "1", "--engine", "onnx", *QUICK, "--json")[1])
    assert {row["engine"] for row in found["rows"]} == {"eager fp32", "onnx-fp32"}
    assert found["chosen"] == ""
    assert found["remarks"] == ["only some engines were measured, so the default engine does not change"]
    assert select_engine(bundle) == before


def test_the_table_says_what_was_left_out_and_what_it_was_measured_on(bundle: Bundle, cli: Cli) -> None:
    wrong = EngineId("onnx", "fp32", "wrong")
    folder = shutil.copytree(bundle.engine_folder(ONNX), bundle.engine_folder(wrong))
    path = folder / EngineRecord.read(folder).file
    model = onnx.load(path)
    model.graph.ClearField("node")
    onnx.save(model, path)
    record = json.loads((folder / RECORD).read_text()) | {"file_sha256": sha256(path), "engine_id": str(wrong)}
    (folder / RECORD).write_text(json.dumps(record))
    code, output, errors = cli("benchmark", bundle.path, "--batches", "1", "--threads", "shared", *QUICK)
    assert code == 0, errors
    assert "left out: onnx-fp32-wrong: ONNX Runtime cannot load" in output
    for text in ("onnx-fp32 ", "torch-fp32 ", "eager fp32 ", "1.00 ", "GFLOP/s", "threads shared", "torch 2."):
        assert text in output


def test_without_torch_there_is_no_eager_row_and_it_says_so(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "uni_instruct", "benchmark", str(bundle.path), "--batches", "1,2", *QUICK, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert {row["engine"] for row in found["rows"]} == {"onnx-fp32"}
    assert [row["to_eager"] for row in found["rows"]] == [None, None]
    assert found["left_out"] == {"torch-fp32": "package 'torch' is not installed"}
    assert any(remark.startswith("no comparison with torch eager: torch is not installed") for remark in found["remarks"])
    assert found["chosen"] == "onnx-fp32"


WRONG = {
    ("--batches", "0"): "batches '0' are not sizes from 1 to 4096; write them as 1,4,16,64",
    ("--batches", "1,,2"): "batches '1,,2' are not sizes",
    ("--batches", "-1"): "batches '-1' are not sizes",
    ("--batches", "4097"): "are not sizes from 1 to 4096",
    ("--batches", ",".join(map(str, range(1, 20)))): "19 batch sizes are too many; give at most 16",
    ("--engine", "onnx-fp4"): "engine 'onnx-fp4' is unknown",
    ("--engine", "openvino"): "has no openvino engine; uni-instruct export",
    ("--device", "tpu"): "device 'tpu' is unknown; use cpu, cuda or cuda:1",
    ("--plot", "speed.jpg"): "--plot speed.jpg is not the name of a PNG",
    ("--plot", "/proc/speed.png"): "cannot write /proc/speed.png",
    ("--rounds", "0"): "0 is not in the range",
    ("--seconds", "nan"): "nan is not in the range",
    ("--threads", "some"): "'some' is not one of",
}


@pytest.mark.parametrize("wrong", WRONG, ids=" ".join)
def test_a_wrong_request_is_one_line_and_code_2(wrong: tuple[str, str], bundle: Bundle, cli: Cli) -> None:
    code, output, errors = cli("benchmark", bundle.path, *wrong)
    assert (code, output) == (2, "")
    assert WRONG[wrong] in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_a_teacher_is_no_one_step_generator(tiny_teacher: Bundle, cli: Cli) -> None:
    code, _, errors = cli("benchmark", tiny_teacher.path)
    assert (code, errors) == (
        2,
        "error: 'tiny' is a teacher of 4 steps, not a one-step generator; benchmark a one-step generator, such as digits\n",
    )


def test_without_matplotlib_the_extra_is_named_before_anything_is_measured(
    bundle: Bundle, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, errors = cli("benchmark", bundle.path, "--plot", "speed.png")
    assert (code, errors) == (2, "error: package 'matplotlib' is not installed; pip install 'uni-instruct[benchmark]'\n")


def test_an_engine_that_fails_at_a_batch_is_named(bundle: Bundle, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory runs out at the largest one."""
    whole = comparison._caller

    def failing(engine: Any) -> Callable[[Any], object]:
        def run(inputs: Any) -> object:
            if engine.id == TORCH and len(inputs.noise) == 4:
                raise MemoryError("cannot allocate")
            return whole(engine)(inputs)

        return run

    monkeypatch.setattr(comparison, "_caller", failing)
    code, output, errors = cli("benchmark", bundle.path, "--batches", "1,4", *QUICK)
    assert (code, output) == (1, "")
    assert "error: torch-fp32 failed at batch 4: MemoryError: cannot allocate; leave that batch out of --batches" in errors


def test_latents_are_measured_too(tmp_path: Path, cli: Cli) -> None:
    latents = random_bundle(tmp_path / "latents", seed=3, image_shape=(4, 8, 8), latents=True)
    code, output, errors = cli("benchmark", latents.path, "--batches", "2", *QUICK, "--json")
    assert code == 0, errors
    assert [row["engine"] for row in json.loads(output)["rows"]] == ["eager fp32", "torch-fp32"]
