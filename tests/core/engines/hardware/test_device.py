"""A device is an argument: what it may be, where it is refused, and that nothing ever runs elsewhere than was asked for."""

from collections.abc import Callable

import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.engine import TORCH, EngineId, available_engines, engine_status, open_engine
from uni_instruct.engines import runtime
from uni_instruct.engines.hardware import cuda, device
from uni_instruct.engines.hardware.cuda import Gpu
from uni_instruct.engines.hardware.device import checked_device
from uni_instruct.errors import RequestError

Cli = Callable[..., tuple[int, str, str]]
without_gpu = pytest.mark.skipif(bool(cuda.gpus()), reason="a GPU is here")


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:1234", "CPU", "", "cpu:0"])
def test_what_is_no_device_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is unknown; use cpu, cuda or cuda:1"):
        checked_device(text)


@pytest.mark.parametrize(
    "arguments", ["generate {} --seeds 0 --grid {}/x.png", "benchmark {}", "export {} --to onnx --dry-run"]
)
def test_an_empty_device_is_not_taken_for_none(arguments: str, exported_bundle: Bundle, cli: Cli) -> None:
    """What a shell makes of a variable that was never set."""
    words = (word.replace("{}", str(exported_bundle.path)) for word in arguments.split())
    code, output, errors = cli(*words, "--device", "")
    assert (code, output) == (2, "")
    assert errors == "error: device '' is unknown; use cpu, cuda or cuda:1\n"
    with pytest.raises(RequestError, match="device '' is unknown"):
        open_engine(exported_bundle, device="")


def test_a_device_is_counted_among_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "gpus", lambda: (Gpu("A", 89), Gpu("B", 120)))
    assert [checked_device(text) for text in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda:0", "cuda:1"]
    with pytest.raises(
        RequestError, match="device cuda:2 was asked for, and this process sees only 2 CUDA devices; use cuda:0 or cuda:1"
    ):
        checked_device("cuda:2")


@without_gpu
def test_cuda_without_one_is_refused_for_every_engine(exported_bundle: Bundle) -> None:
    for engine_id in (None, *available_engines(exported_bundle)):
        with pytest.raises(RequestError, match="sees no CUDA device; use --device cpu"):
            open_engine(exported_bundle, engine_id, device="cuda")


@without_gpu
@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--seeds", "0", "--out", "images.npz"),
        ("evaluate", "--reference", "digits"),
        ("serve",),
        ("export", "--to", "onnx", "--dry-run"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_refuses_cuda_without_one(arguments: tuple[str, ...], exported_bundle: Bundle, cli: Cli) -> None:
    command, *rest = arguments
    code, _, error = cli(command, exported_bundle.path, *rest, "--device", "cuda:1")
    assert code == 2
    assert "device cuda:1 was asked for, and this process sees no CUDA device; use --device cpu" in error


def test_every_engine_runs_on_the_cpu_where_it_was_asked_to(exported_bundle: Bundle) -> None:
    for engine_id in available_engines(exported_bundle):
        engine = open_engine(exported_bundle, engine_id, device="cpu")
        assert (engine.id, engine.device) == (engine_id, "cpu")
        assert engine_status(exported_bundle, engine_id).device == "cpu"


def test_a_build_without_cuda_is_told_from_a_machine_without_a_gpu(
    exported_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU that this machine's CPU builds cannot use: said for what was asked, passed over where nothing was."""
    for module in (device, runtime):
        monkeypatch.setattr(module, "gpus", lambda: (Gpu("A", 89),))
    monkeypatch.setattr(runtime, "version", lambda name: {"torch": "2.13.0+cpu", "onnxruntime": "1.32.0"}[name])
    monkeypatch.setattr(runtime, "PackageNotFoundError", KeyError)
    with pytest.raises(RequestError, match=r"onnxruntime 1\.32\.0 cannot use cuda:0; install onnxruntime-gpu instead"):
        open_engine(exported_bundle, "onnx-fp32", device="cuda")
    with pytest.raises(RequestError, match=r"torch 2\.13\.0\+cpu cannot use cuda:0; install a CUDA build of torch instead"):
        open_engine(exported_bundle, TORCH, device="cuda")
    assert open_engine(exported_bundle, "onnx-fp32").device == "cpu"


def test_openvino_is_refused_on_a_gpu(exported_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = runtime.RUNTIMES["openvino"]
    with pytest.raises(RequestError, match="engine openvino-fp32 does not run on cuda:0; use --device cpu"):
        chosen.device_for(EngineId("openvino", "fp32"), "cuda:0")


def test_two_packages_of_one_module_are_refused(exported_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "version", lambda name: "1.32.0")
    with pytest.raises(
        RequestError, match="are both installed, but they share files and break each other; pip uninstall -y onnx"
    ):
        open_engine(exported_bundle, "onnx-fp32")
