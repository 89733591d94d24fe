"""Compiled engines: only where asked for, made once and kept, refused where they cannot be had. What they answer is held in
test_conformance.py."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders.bundles import random_bundle
from uni_instruct.bundle import Bundle
from uni_instruct.engine import (
    TORCH,
    TORCH_COMPILED,
    available_engines,
    engine_status,
    load_engine,
    open_engine,
    select_engine,
)
from uni_instruct.engines import runtime
from uni_instruct.engines.compiled import cache as compiled
from uni_instruct.engines.compiled.cache import compiled_path
from uni_instruct.engines.hardware.cuda import Gpu
from uni_instruct.engines.outputs import TOLERANCES, agreement
from uni_instruct.engines.record import EngineId
from uni_instruct.errors import CompilationError, RequestError, UniInstructError
from uni_instruct.noise import noise, round_robin_class_ids

Cli = Callable[..., tuple[int, str, str]]
SCRIPT = """
import sys
import numpy as np
from uni_instruct.engine import open_engine
from uni_instruct.noise import round_robin_class_ids, noise
from uni_instruct.system.progress import log_to_stderr
log_to_stderr("uni_instruct.engines.compiled.cache")
engine = open_engine(sys.argv[1], sys.argv[2])
np.save(sys.argv[3], engine(noise(range(5), engine.spec.noise_shape), round_robin_class_ids(engine.spec, 5)))
assert "torch._inductor" not in sys.modules and "torch._dynamo" not in sys.modules
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "uni-instruct" / "compiled"


@pytest.fixture
def never_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compilation would be an error."""
    monkeypatch.setattr(compiled, "_compile", None)


@pytest.mark.usefixtures("cache", "never_compiles")
def test_nothing_is_compiled_where_it_was_not_asked_for(tiny_bundle: Bundle, tiny_teacher: Bundle) -> None:
    for bundle in (tiny_bundle, tiny_teacher):
        assert available_engines(bundle) == [TORCH]
        for wanted in (None, "torch", TORCH):
            assert select_engine(bundle, wanted).engine_id == TORCH
        assert engine_status(bundle, TORCH_COMPILED).state == "untried"


@pytest.mark.usefixtures("cache", "never_compiles")
def test_latents_and_a_teachers_16_bits_are_not_compiled(tiny_teacher: Bundle, tmp_path: Path) -> None:
    latents = random_bundle(tmp_path / "latents", 3, image_shape=(4, 8, 8), latents=True)
    for bundle, wanted in ((latents, "torch-fp32-compiled"), (tiny_teacher, "torch-bf16-compiled")):
        with pytest.raises(RequestError, match=f"has no {wanted} engine; choose one of torch-fp32"):
            open_engine(bundle, wanted)


@pytest.mark.usefixtures("cache", "never_compiles")
def test_without_a_compiler_that_is_said_before_anything_else(
    tiny_bundle: Bundle, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    wanted = ("--engine", "torch-fp32-compiled")
    code, output, errors = cli("generate", tiny_bundle.path, "--seeds", "0", "--out", tmp_path / "o", *wanted)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert "compiled engines need a C++ compiler, and there is no 'no-such-compiler' here; install it" in errors
    assert cli("benchmark", tiny_bundle.path, *wanted)[0] == 2
    assert engine_status(tiny_bundle, TORCH_COMPILED).state == "absent"
    assert open_engine(tiny_bundle).id == TORCH  # nobody else is disturbed


@pytest.mark.usefixtures("cache", "never_compiles")
def test_it_runs_on_the_cpu_and_never_on_a_gpu_instead(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = runtime.RUNTIMES["torch"]
    monkeypatch.setattr(runtime, "gpus", lambda: (Gpu("a GPU", 90),))
    monkeypatch.setattr(runtime, "version", lambda name: "2.13.0+cu130")
    assert torch.device_for(TORCH, None) == "cuda:0"
    assert torch.device_for(TORCH_COMPILED, None) == "cpu"
    with pytest.raises(RequestError, match="engine torch-fp32-compiled does not run on cuda:0; use --device cpu"):
        torch.device_for(TORCH_COMPILED, "cuda:0")


def test_what_the_code_depends_on_is_in_the_name_of_its_file(
    tiny_bundle: Bundle, tiny_teacher: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bf16 = EngineId("torch", "bf16", "compiled")
    found = {compiled_path(tiny_bundle, TORCH_COMPILED), compiled_path(tiny_bundle, bf16)}
    found.add(compiled_path(tiny_teacher, TORCH_COMPILED))
    monkeypatch.setattr(compiled, "usable_cpus", lambda: 77)
    found.add(compiled_path(tiny_bundle, TORCH_COMPILED))
    monkeypatch.setattr(compiled, "machine", lambda: "another processor")
    found.add(compiled_path(tiny_bundle, TORCH_COMPILED))
    assert len(found) == 5
    assert {path.parent for path in found} == {cache}
    # A teacher's file is its denoiser: whatever the number of its steps.
    assert compiled_path(tiny_teacher.with_steps(9), TORCH_COMPILED) == compiled_path(tiny_teacher, TORCH_COMPILED)


@pytest.mark.slow
def test_a_compiler_that_fails_is_named_and_torch_alone_goes_on(
    tiny_bundle: Bundle, cache: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "false")
    wanted = ("--engine", "torch-fp32-compiled")
    code, output, errors = cli("generate", tiny_bundle.path, "--seeds", "0", "--out", tmp_path / "o", *wanted)
    assert (code, output) == (1, "")
    assert "error: engine torch-fp32-compiled cannot be compiled here: " in errors
    assert "; check the C++ compiler (environment variable CXX), or use --engine torch-fp32\n" in errors
    assert not list(cache.glob("*.so"))
    with pytest.raises(CompilationError):
        load_engine(tiny_bundle, TORCH_COMPILED)


def test_a_file_without_code_is_said_to_be_one(tiny_bundle: Bundle, cache: Path) -> None:
    path = compiled_path(tiny_bundle, TORCH_COMPILED)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no code")
    with pytest.raises(UniInstructError, match=r"cannot be loaded: .*; delete it to have it compiled again"):
        load_engine(tiny_bundle, TORCH_COMPILED)


@pytest.mark.slow
def test_it_is_compiled_once_and_the_next_process_finds_it(tiny_bundle: Bundle, cache: Path, tmp_path: Path) -> None:
    made = []
    for name in ("first.npy", "second.npy"):
        command = [sys.executable, "-c", SCRIPT, str(tiny_bundle.path), "torch-fp32-compiled", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made.append((np.load(tmp_path / name), "compiling engine" in done.stderr))
    (first, was_compiled), (second, was_compiled_again) = made
    assert (was_compiled, was_compiled_again) == (True, False)
    np.testing.assert_array_equal(first, second)
    (kept,) = cache.glob("*.so")
    assert kept == compiled_path(tiny_bundle, TORCH_COMPILED)


@pytest.mark.slow
def test_without_a_cache_it_is_compiled_for_this_process(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO):
        engine = load_engine(tiny_bundle, TORCH_COMPILED)
    assert "cannot be written to the cache, so every process compiles it again" in caplog.text
    inputs = noise(range(5), tiny_bundle.spec.noise_shape), round_robin_class_ids(tiny_bundle.spec, 5)
    truth = load_engine(tiny_bundle, TORCH).outputs(*inputs)
    assert not agreement([engine.outputs(*inputs)], truth.images).problem(TOLERANCES["fp32"])


@pytest.mark.slow
def test_a_teacher_is_compiled_and_held_against_torch(tiny_teacher: Bundle, cache: Path) -> None:
    engine = open_engine(tiny_teacher, TORCH_COMPILED)
    status = engine_status(tiny_teacher, TORCH_COMPILED)
    assert (status.state, status.reason) == ("trusted", "")
    assert status.trial is not None
    assert status.trial.relative_l2 is not None
    for teacher in (tiny_teacher, tiny_teacher.with_steps(7)):
        inputs = noise(range(5), teacher.spec.noise_shape), round_robin_class_ids(teacher.spec, 5)
        found, truth = load_engine(teacher, TORCH_COMPILED).outputs(*inputs), load_engine(teacher, TORCH).outputs(*inputs)
        assert not agreement([found], truth.images).problem(TOLERANCES["fp32"])
    assert len(list(cache.glob("*.so"))) == 1
    assert engine.id == TORCH_COMPILED
