"""An engine is trusted where it runs: tried on this machine before its first use, and chosen by what was measured there."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from builders.bundles import ONNX
from uni_instruct.bundle import Bundle
from uni_instruct.engine import RUNTIMES, TORCH, EngineId, engine_status, open_engine, select_engine
from uni_instruct.engines.record import RECORD, EngineRecord
from uni_instruct.engines.trials import trial as trial_module
from uni_instruct.engines.trials.trial import recorded_trial, trial_key
from uni_instruct.errors import BundleError, EngineRefusedError, MissingExtraError
from uni_instruct.reference import REFERENCE
from uni_instruct.system.files import sha256

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trial_module, "_unrecorded", {})
    return tmp_path / "cache" / "uni-instruct" / "engines"


@pytest.fixture
def bundle(exported_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(exported_bundle.path, tmp_path / "bundle"))


def rewrite(bundle: Bundle, alter: Callable[[onnx.ModelProto], object], engine_id: EngineId = ONNX) -> None:
    """Another engine file whose hash its record knows, as if it had been built here and passed."""
    folder = bundle.engine_folder(engine_id)
    path = folder / EngineRecord.read(folder).file
    model = onnx.load(path)
    alter(model)
    onnx.save(model, path)
    record = json.loads((folder / RECORD).read_text()) | {"file_sha256": sha256(path), "engine_id": str(engine_id)}
    (folder / RECORD).write_text(json.dumps(record))


def slightly_wrong(model: onnx.ModelProto) -> None:
    """One filter of the first convolution is wrong by 1 percent of its size."""
    tensor = next(t for t in model.graph.initializer if t.name.endswith("8x8_conv.weight"))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[0] *= 1.01
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def not_finite(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name.endswith("8x8_conv.bias"))
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(tensor.dims, np.nan, np.float32), tensor.name))


def raising(model: onnx.ModelProto) -> None:
    """The graph loads, and fails on every call: it reshapes its images to a size that they do not have."""
    node = next(node for node in model.graph.node if "denoised" in node.output)
    node.output[list(node.output).index("denoised")] = "whole"
    for other in model.graph.node:
        other.input[:] = ["whole" if name == "denoised" else name for name in other.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 1, 8, 7919]), "impossible"))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["whole", "impossible"], ["denoised"]))


def slow(model: onnx.ModelProto) -> None:
    """The same images after work for nothing: 0 times the mean of a chain of large products is added to the noise."""
    graph, name = model.graph, "noise"
    for node in graph.node:
        node.input[:] = ["same_noise" if i == name else i for i in node.input]
    size = 1000
    tensors = {"square": np.full((size, size), 1e-3, np.float32), "zero": np.zeros(1, np.float32)}
    graph.initializer.extend(onnx.numpy_helper.from_array(array, key) for key, array in tensors.items())
    work = [
        onnx.helper.make_node("ReduceMean", [name], ["mean"], keepdims=0),
        onnx.helper.make_node("Add", ["square", "mean"], ["p0"]),
    ]
    work += [onnx.helper.make_node("MatMul", [f"p{i}", "square"], [f"p{i + 1}"]) for i in range(4)]
    work += [
        onnx.helper.make_node("ReduceMean", ["p4"], ["last"], keepdims=0),
        onnx.helper.make_node("Mul", ["last", "zero"], ["nothing"]),
        onnx.helper.make_node("Add", [name, "nothing"], ["same_noise"]),
    ]
    nodes = [*work, *graph.node]
    graph.ClearField("node")
    graph.node.extend(nodes)


def notes(cache: Path) -> dict[str, dict[str, Any]]:
    return {path.name.rpartition("-")[0]: json.loads(path.read_text()) for path in cache.glob("*.json")}


def test_an_engine_is_tried_once_and_what_it_did_is_noted(bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_engine(bundle).id == ONNX
    found = notes(cache)
    assert set(found) == {"onnx-fp32", "torch-fp32"}
    assert 0 < found["onnx-fp32"]["relative_l2"] < 1e-5
    assert found["onnx-fp32"]["pixel_difference"] <= 1
    assert found["torch-fp32"]["relative_l2"] < 1e-5  # not 0: its last bit depends on the batch
    assert all(note["images_per_s"] > 0 and note["problem"] == "" for note in found.values())
    status = engine_status(bundle, ONNX)
    assert status.state == "trusted"
    assert status.facts()["images_per_s"] == found["onnx-fp32"]["images_per_s"]
    monkeypatch.setattr(trial_module, "_run", None)  # a second trial would be an error
    assert open_engine(bundle).id == ONNX
    # The same file in another place is the same engine.
    other = Bundle.open(shutil.copytree(bundle.path, bundle.path.with_name("other")))
    assert select_engine(other).engine_id == ONNX


WRONG = {
    slightly_wrong: "its images differ from torch's by",
    not_finite: "it returns NaN or infinite values",
    raising: "it raises",
    lambda model: model.graph.ClearField("node"): "ONNX Runtime cannot load",
}


@pytest.mark.parametrize("wrong", WRONG, ids=["slightly wrong", "not finite", "raising", "no graph"])
def test_an_engine_that_cannot_be_trusted_here_is_refused_and_all_say_so(
    wrong: Callable[[onnx.ModelProto], object],
    bundle: Bundle,
    cache: Path,
    cli: Cli,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rewrite(bundle, wrong)
    with caplog.at_level(logging.WARNING):
        selection = select_engine(bundle)
    assert selection.engine_id == TORCH
    (refused,) = selection.refused
    assert refused.engine_id == ONNX
    assert WRONG[wrong] in refused.reason
    assert f"engine onnx-fp32 cannot be used on this machine: {refused.reason}; using torch-fp32 instead" in caplog.text
    (fact,) = json.loads(cli("inspect", bundle.path, "--json")[1])["engines"]
    assert (fact["here"]["state"], fact["here"]["reason"]) == ("refused", refused.reason)
    assert f"refused on this machine: {refused.reason}" in cli("inspect", bundle.path)[1]
    for wanted in ("onnx-fp32", "onnx"):  # asked for, it is never another
        code, output, errors = cli("generate", bundle.path, "--seeds", "0", "--out", tmp_path / "out", "--engine", wanted)
        assert (code, output) == (1, "")
        assert "engine onnx-fp32 cannot be used on this machine" in errors
        note = next(cache.glob("onnx-*"))
        remedy = f"use --engine torch-fp32, or delete {note}, where the failure is recorded, to have it checked again"
        assert remedy in errors
        assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()
    next(cache.glob("onnx-*")).unlink()
    assert engine_status(bundle, ONNX).state == "untried"


def test_the_fastest_is_chosen_and_not_the_first(bundle: Bundle) -> None:
    slower = EngineId("onnx", "fp32", "aa")  # stands before the other in every list
    shutil.copytree(bundle.engine_folder(ONNX), bundle.engine_folder(slower))
    shutil.move(bundle.engine_folder(ONNX), bundle.engine_folder(EngineId("onnx", "fp32", "bb")))
    rewrite(bundle, lambda model: None, EngineId("onnx", "fp32", "bb"))
    rewrite(bundle, slow, slower)
    selection = select_engine(bundle, "onnx")
    assert selection.engine_id == EngineId("onnx", "fp32", "bb")
    assert not selection.refused
    speeds = [status.trial.images_per_s for status in selection.statuses if status.trial]
    assert speeds[0] is not None
    assert speeds[1] is not None
    assert 2 * speeds[0] < speeds[1]
    engine = open_engine(bundle, slower)  # by its id it still runs
    assert engine.id == slower
    shutil.rmtree(bundle.engine_folder(EngineId("onnx", "fp32", "bb")))
    assert select_engine(bundle).engine_id == TORCH  # torch is faster than that


def test_another_processor_runtime_or_reference_is_another_trial(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    select_engine(bundle, ONNX)
    ((name, note),) = notes(cache).items()
    monkeypatch.setattr(trial_module, "machine", lambda: "another processor")
    assert engine_status(bundle, ONNX).state == "untried"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    assert recorded_trial(trial_key(bundle, ONNX, "onnxruntime 0.1", "cpu")) is None
    assert recorded_trial(trial_key(bundle, ONNX, RUNTIMES["onnx"].version(), "cpu")) is not None
    assert recorded_trial(trial_key(bundle, ONNX, RUNTIMES["onnx"].version(), "cuda:0")) is None
    # A file that claims to be this machine's, from another.
    (path,) = cache.iterdir()
    path.write_text(json.dumps(note | {"machine": "another processor"}))
    assert engine_status(bundle, ONNX).state == "untried"
    path.write_text(json.dumps(note))
    assert engine_status(bundle, ONNX).state == "trusted"
    (bundle.path / REFERENCE).unlink()
    assert engine_status(bundle, ONNX).state == "untried"
    assert name == "onnx-fp32"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"problem": ""}', "images_per_s", "relative_l2", "problem"],
    ids=["empty", "cut", "list", "binary", "null", "little", "speed", "distance", "reason"],
)
def test_a_damaged_note_is_written_anew(content: bytes | str, bundle: Bundle, cache: Path) -> None:
    select_engine(bundle, ONNX)
    (path,) = cache.iterdir()
    whole = json.loads(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(whole | {content: ["?"]}).encode())
    assert engine_status(bundle, ONNX).state == "untried"
    assert select_engine(bundle, ONNX).engine_id == ONNX
    assert json.loads(path.read_text()).keys() == whole.keys()
    assert engine_status(bundle, ONNX).state == "trusted"


@pytest.mark.parametrize("kind", ["a file in its way", "no home"])
def test_without_a_cache_it_works_too(kind: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", staticmethod(lambda: (_ for _ in ()).throw(RuntimeError("no home"))))
    else:
        (tmp_path / "cache").write_text("")
    assert open_engine(bundle, ONNX).id == ONNX
    rewrite(bundle, slightly_wrong)
    with pytest.raises(EngineRefusedError, match="its images differ from torch's"):
        open_engine(bundle, ONNX)


def test_without_a_cache_a_process_tries_an_engine_once(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("")
    assert open_engine(bundle, ONNX).id == ONNX
    monkeypatch.setattr(trial_module, "_run", None)  # a second trial would be an error
    assert open_engine(bundle, ONNX).id == ONNX


def test_a_read_only_cache_is_no_error(bundle: Bundle, cache: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert open_engine(bundle, ONNX).id == ONNX
    assert os.listdir(small_disk) == []


def test_two_processes_at_once_agree(bundle: Bundle, cache: Path) -> None:
    code = "import sys\nfrom uni_instruct.engine import open_engine\nprint(open_engine(sys.argv[1], 'onnx').id)"
    command = [sys.executable, "-c", code, str(bundle.path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        assert process.communicate(timeout=120) == ("onnx-fp32\n", "")
    (path,) = cache.iterdir()  # one note, nothing half written
    assert engine_status(bundle, ONNX).state == "trusted"
    assert path.suffix == ".json"


def test_a_trial_needs_no_torch(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    code = """
import sys
from uni_instruct.bundle import Bundle
from uni_instruct.engine import select_engine
selection = select_engine(Bundle.open(sys.argv[1]))
print(selection.engine_id, [status.state for status in selection.statuses])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.path)], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("onnx-fp32 ['trusted', 'absent']\n", "")
    rewrite(bundle, slightly_wrong)
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle.path)], env=environment, capture_output=True, text=True, check=False
    )
    assert "EngineRefusedError: engine onnx-fp32 cannot be used on this machine: its images differ" in done.stderr
    assert "pip install 'uni-instruct[train]' for torch, or delete" in done.stderr


def test_a_process_that_dies_is_told_by_its_signal(
    bundle: Bundle, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a runtime does on a processor that it does not know. Whoever kills the process says nothing about the engine."""
    for name, lasting in (("SIGFPE", True), ("SIGKILL", False)):
        text = f"import os, signal, sys\nif 'trials.worker' in ' '.join(sys.orig_argv): os.kill(os.getpid(), signal.{name})\n"
        (tmp_path / "sitecustomize.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        selection = select_engine(bundle)
        assert selection.engine_id == TORCH
        assert [status.reason for status in selection.refused] == [f"its process was ended by {name}"]
        assert bool(notes(cache)) is lasting
        shutil.rmtree(cache, ignore_errors=True)


def test_a_runtime_that_is_not_installed_leaves_the_place_to_torch(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not RUNTIMES["onnx"].is_installed()
    assert select_engine(bundle).engine_id == TORCH
    assert engine_status(bundle, ONNX).reason == "package 'onnxruntime' is not installed"
    with pytest.raises(MissingExtraError, match=r"pip install 'uni-instruct\[serve\]'"):
        open_engine(bundle, ONNX)


def test_damage_is_no_matter_of_the_machine(bundle: Bundle, cache: Path) -> None:
    (bundle.path / REFERENCE).write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"reference\.npz cannot be read"):
        open_engine(bundle)
    shutil.copy(bundle.engine_folder(ONNX) / RECORD, bundle.path / REFERENCE)
    path = bundle.engine_folder(ONNX) / EngineRecord.read(bundle.engine_folder(ONNX)).file
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(BundleError, match="does not match the sha256"):
        open_engine(bundle)
    assert notes(cache) == {}


def test_without_a_reference_an_engine_is_timed_and_taken_at_its_word(bundle: Bundle, cache: Path) -> None:
    (bundle.path / REFERENCE).unlink()
    (status,) = select_engine(bundle, ONNX).statuses
    assert (status.state, status.reason) == ("trusted", "there is no reference.npz to compare it with")
    assert status.trial is not None
    assert asdict(status.trial)["relative_l2"] is None
