"""How an engine's threads use the CPUs: as many as there are, spinning only where a core is to spare for each."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.engines.hardware import threads
from uni_instruct.engines.hardware.threads import Threads
from uni_instruct.generate import generate_images, resolve_class_ids

SEEDS = list(range(20))


def load(wanting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine as it is when so many threads, ours among them, want a core."""
    (tmp_path / "loadavg").write_text(f"0.00 0.00 0.00 {wanting}/230 4711\n")
    monkeypatch.setattr(threads, "LOAD", tmp_path / "loadavg")


@pytest.mark.parametrize("spin", [True, False])
def test_threads_spin_as_asked_and_images_do_not_depend_on_it(
    spin: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("1", tmp_path, monkeypatch)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 64)
    bundle = Bundle.open("digits")
    engine: Any = open_engine(bundle, "onnx", spin=spin)
    options = engine._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spin))
    assert options.intra_op_num_threads == threads.usable_cpus()
    images = generate_images(engine, SEEDS, resolve_class_ids(bundle.spec, SEEDS), 64)
    load("9", tmp_path, monkeypatch)
    other = open_engine(bundle, "onnx")
    np.testing.assert_array_equal(images, generate_images(other, SEEDS, resolve_class_ids(bundle.spec, SEEDS), 64))


@pytest.mark.parametrize(("wanting", "spins"), [("1", True), ("3", True), ("4", False), ("40", False), ("?", True)])
def test_threads_spin_only_where_a_core_is_to_spare_for_each(
    wanting: str, spins: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four cores, two threads: beside two others there is room, beside three there is none."""
    load(wanting, tmp_path, monkeypatch)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 2)
    assert Threads.here(spin=True) == Threads(count=2, spin=spins)
    assert Threads.here(spin=False) == Threads(count=2, spin=False)
    monkeypatch.setattr(threads, "LOAD", tmp_path / "none")  # not on this system
    assert threads.runnable_threads() == 0


def test_pinned_threads_get_a_core_each_as_onnx_runtime_counts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 2, 5}, raising=False)
    entries = Threads(count=3, spin=False, pin=True).for_onnxruntime()
    assert entries["session.intra_op_thread_affinities"] == "3;6"  # the caller's own thread is the first
    assert "session.intra_op_thread_affinities" not in Threads(count=1, spin=False, pin=True).for_onnxruntime()
    monkeypatch.undo()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    for key, value in Threads(count=2, spin=False, pin=True).for_onnxruntime().items():
        options.add_session_config_entry(key, value)
    (stored,) = Bundle.open("digits").engines().values()
    onnxruntime.InferenceSession(stored.file(), options, providers=["CPUExecutionProvider"])  # it takes them


def test_torch_gets_no_more_threads_than_the_process_may_use_and_never_more_than_were_set() -> None:
    """In processes of their own: OpenMP reads how to wait when torch is loaded, and the number is the process's."""
    code = """
import os, sys
from pathlib import Path
from uni_instruct.engine import open_engine
from uni_instruct.engines.hardware import threads
threads.usable_cpus, threads.LOAD = lambda: int(sys.argv[1]), Path("/none")
os.cpu_count = lambda: 64
engine = open_engine("digits", "torch", spin=sys.argv[3] == "spin")
import torch
torch.set_num_threads(int(sys.argv[2]))
threads.Threads.here(spin=False).for_torch()
print(torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY"))
assert "torch._dynamo" not in sys.modules  # a second of imports, for what an engine does not use
"""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for arguments, expected in ((("1", "3", "sleep"), "1 PASSIVE\n"), (("8", "3", "spin"), "3 None\n")):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert (done.stdout, done.returncode) == (expected, 0), done.stderr


@pytest.mark.parametrize(
    ("quota", "wanted", "expected"),
    [
        ("max 100000", "", None),
        ("100000 100000", "", 1),
        ("150000 100000", "", 2),
        ("max 100000", "1", 1),
        ("max 100000", "4096", None),
        ("max 100000", "0", 1),
        ("max 100000", "2,1", None),
        ("50000 100000", "8", 1),
    ],
)
def test_threads_follow_the_cpus_the_quota_and_the_user(
    quota: str, wanted: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota + "\n")
    monkeypatch.setattr(threads, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    here = len(os.sched_getaffinity(0))
    assert threads.usable_cpus() == min(here, expected or here)
