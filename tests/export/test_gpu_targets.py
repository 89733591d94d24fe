"""Engines for one kind of GPU: which can be asked for, which are refused, and what TensorRT-RTX itself says."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.engine import EngineId
from uni_instruct.engines.hardware.cuda import Gpu, gpus
from uni_instruct.errors import MissingExtraError, RequestError, UniInstructError
from uni_instruct.export import targets
from uni_instruct.export.capabilities import CAPABILITIES
from uni_instruct.export.targets import choose_targets, export_engine, find_target

Cli = Callable[..., tuple[int, str, str]]
without_gpu = pytest.mark.skipif(bool(gpus()), reason="a GPU is here")
needs_rtx = pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="tensorrt_rtx is not installed")


@pytest.fixture
def unexported(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(tiny_bundle.path, tmp_path / "bundle"))


def ids(*arguments: list) -> list[str]:
    return [str(target.engine_id) for target in choose_targets(*arguments)]


def test_a_capability_gets_the_precisions_that_it_can_take() -> None:
    assert ids(["tensorrt-rtx"], [], [75, 89]) == [
        "tensorrt-rtx-fp32-sm89",
        "tensorrt-rtx-fp16-sm75",
        "tensorrt-rtx-fp16-sm89",
        "tensorrt-rtx-bf16-sm89",
    ]
    assert ids(["tensorrt-rtx"], ["fp16"], [120]) == ["tensorrt-rtx-fp16-sm120"]
    assert find_target("tensorrt-rtx-fp16-sm120").engine_id == EngineId("tensorrt-rtx", "fp16", "sm120")


@without_gpu
def test_what_this_machine_has_decides_where_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ids(["onnx"]) == ["onnx-fp32"]  # fp16 is for GPUs
    assert ids(["onnx"], ["fp16"]) == ["onnx-fp16"]
    assert not any(target.sms for target in choose_targets(["all"]))
    monkeypatch.setattr(targets, "gpus", lambda: (Gpu("A", 90), Gpu("A", 90), Gpu("B", 89)))
    assert ids(["onnx"]) == ["onnx-fp32", "onnx-fp16"]
    assert ids(["tensorrt"], ["fp16"]) == ["tensorrt-fp16-sm89", "tensorrt-fp16-sm90"]


@pytest.mark.parametrize("engine_id", ["tensorrt-rtx-fp16", "onnx-fp32-sm89", "tensorrt-rtx-fp16-gpu", "coreml-fp16"])
def test_an_id_without_its_target_is_no_target(engine_id: str) -> None:
    with pytest.raises(RequestError, match="is unknown; choose one of onnx-fp32"):
        find_target(engine_id)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--to tensorrt-rtx --sm 75 --precision bf16",
            "tensorrt-rtx cannot build bf16 engines for sm75; choose from 80, 86, 89, 120, 121",
        ),
        (
            "--to tensorrt-rtx --sm 75,80 --precision fp32",
            "tensorrt-rtx cannot build fp32 engines for sm75; choose from 80, 86, 89",
        ),
        ("--to tensorrt-rtx --sm 90", "tensorrt-rtx does not build for sm90; choose from 75, 80, 86, 89, 120, 121"),
        ("--to tensorrt-rtx --sm 8.9", "--sm '8.9' cannot be read; write it as 89, or 80,86,89"),
        ("--to onnx --sm 89", "--sm applies only to tensorrt and tensorrt-rtx, and --to names neither; leave --sm out"),
        (
            "--to tensorrt-rtx",
            "built for one kind of GPU, and this machine has no GPU; name the compute capability, such as --sm 89 for 8.9",
        ),
        (
            "--to tensorrt --sm 89 --device cuda",
            "" if importlib.util.find_spec("tensorrt") else "pip install 'uni-instruct[gpu]'",
        ),
    ],
)
@without_gpu
def test_a_wrong_request_is_one_line(options: str, message: str, tiny_bundle: Bundle, cli: Cli) -> None:
    code, output, error = cli("export", tiny_bundle.path, *options.split())
    assert (code, output) == (2, "")
    assert message in error
    assert error.count("\n") == 1


@without_gpu
def test_all_says_what_it_leaves_out_for_want_of_a_gpu(tiny_bundle: Bundle, cli: Cli) -> None:
    code, output, error = cli("export", tiny_bundle.path, "--to", "all", "--dry-run")
    assert code == 0
    assert "tensorrt" not in output
    assert "skipping TensorRT engines: this machine has no GPU that they support; name the GPUs to build for with --sm" in error
    assert (
        "skipping onnx-fp16: it is meant for GPUs, and this machine has none; add --precision fp16 to build it anyway" in error
    )
    assert "onnx-fp16" not in output
    output = cli("export", tiny_bundle.path, "--to", "all", "--precision", "fp16", "--dry-run")[1]
    assert "would build" in output
    assert "onnx-fp16" in output


@pytest.mark.parametrize(
    ("gpu", "options"), [(Gpu("A", 89), ()), (None, ("--precision", "int8"))], ids=["no package", "no such precision"]
)
def test_all_blames_the_gpu_only_if_it_is_the_reason(
    gpu: Gpu | None, options: tuple[str, ...], tiny_bundle: Bundle, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_onnx(target: targets.Target) -> None:
        if target.engine_id.runtime != "onnx" or target.engine_id.precision != "fp32":
            raise MissingExtraError("something", extra="gpu")

    monkeypatch.setattr(targets, "gpus", lambda: (gpu,) if gpu else ())
    monkeypatch.setattr(targets.Target, "check_machine", only_onnx)
    code, _, error = cli("export", tiny_bundle.path, "--to", "all", "--dry-run", *options)
    assert code == 0
    assert ("skipping tensorrt-fp16-sm89: package 'something' is not installed" in error) == (gpu is not None)
    assert "no GPU" not in error
    assert "meant for GPUs" not in error


@without_gpu
@needs_rtx
def test_dry_run_names_the_plan(tiny_bundle: Bundle, cli: Cli) -> None:
    options = ("--to", "tensorrt-rtx", "--sm", "89", "--precision", "fp16", "--dry-run", "--json")
    code, output, _ = cli("export", tiny_bundle.path, *options)
    (plan,) = json.loads(output)
    assert code == 0
    assert plan["path"].endswith("engines/tensorrt-rtx-fp16-sm89/tiny-8x8-tensorrt-rtx-fp16-sm89.plan")


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_table_of_capabilities_is_what_tensorrt_rtx_builds(
    precision: str, unexported: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every capability of the table is built; what is left out of it, TensorRT-RTX refuses."""
    table = CAPABILITIES["tensorrt-rtx"]
    row = targets.TARGETS[f"tensorrt-rtx-{precision}"]
    monkeypatch.setattr(
        targets, "find_target", lambda name: replace_sms(row, table["fp16"]).for_gpu(int(name.rpartition("sm")[2]))
    )
    for sm in table["fp16"]:
        name = f"tensorrt-rtx-{precision}-sm{sm}"
        if sm in table[precision]:
            assert export_engine(unexported, name).engine_id == name
        else:
            with pytest.raises(UniInstructError, match=f"tensorrt-rtx cannot build for sm{sm}: .*; use another precision"):
                export_engine(unexported, name)
            assert not unexported.engine_folder(EngineId.parse(name)).exists()


def replace_sms(row: targets.Target, sms: tuple[int, ...]) -> targets.Target:
    return targets.replace(row, sms=sms)
