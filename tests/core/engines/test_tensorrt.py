"""TensorRT's engine: what it does around a plan (on this machine's memory), and what it refuses (by the real TensorRT-RTX)."""

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from builders.bundles import ONNX
from builders.host_gpu import HostStream, tensorrt_on_host
from uni_instruct.bundle import Bundle
from uni_instruct.engine import EngineId, engine_status, open_engine, select_engine
from uni_instruct.engines import runtime
from uni_instruct.engines import tensorrt as tensorrt_engine
from uni_instruct.engines.hardware import cuda, device
from uni_instruct.engines.hardware.cuda import Gpu, gpus
from uni_instruct.engines.record import RECORD, EngineRecord
from uni_instruct.engines.tensorrt import TensorRtEngine, check_version, deserialised, load_package
from uni_instruct.errors import BundleError, MissingExtraError, RequestError
from uni_instruct.export.targets import export_engine
from uni_instruct.generate import mix_classes
from uni_instruct.noise import noise, round_robin_class_ids

PLAN, RTX = EngineId("tensorrt", "fp32", "sm89"), EngineId("tensorrt-rtx", "fp16", "sm89")
Cli = Callable[..., tuple[int, str, str]]
needs_rtx = pytest.mark.skipif(not runtime.RUNTIMES["tensorrt-rtx"].is_installed(), reason="tensorrt_rtx is not installed")
without_gpu = pytest.mark.skipif(bool(gpus()), reason="a GPU is here")


@pytest.fixture(scope="module")
def planned(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose TensorRT engine holds the graph of its ONNX engine, for `host_gpu` to run."""
    path = shutil.copytree(exported_bundle.path, tmp_path_factory.mktemp("planned") / "bundle")
    folder = Bundle.open(path).engine_folder(PLAN)
    shutil.copytree(folder.with_name(str(ONNX)), folder)
    record = EngineRecord.read(folder)
    replace(record, engine_id=str(PLAN), versions={"tensorrt": "11.0"}, batch_profile=(1, 4, 16)).write(folder)
    return Bundle.open(path)


@pytest.fixture
def engine(planned: Bundle, monkeypatch: pytest.MonkeyPatch) -> Iterator[TensorRtEngine]:
    trt = tensorrt_on_host()
    monkeypatch.setattr(tensorrt_engine, "CudaStream", HostStream)
    monkeypatch.setattr(tensorrt_engine, "load_package", lambda engine_id: trt)
    opened = TensorRtEngine(planned, planned.engines()[PLAN], device="cuda:0")
    yield opened
    opened.close()
    assert HostStream.alive == 0


def inputs(bundle: Bundle, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    return noise(range(count), bundle.spec.noise_shape), round_robin_class_ids(bundle.spec, count)


def test_any_batch_is_padded_or_split_and_each_size_is_captured_once(engine: TensorRtEngine, planned: Bundle) -> None:
    truth = open_engine(planned, ONNX)
    for count in (1, 2, 3, 16, 17, 37, 3):
        for found, expected in zip(
            engine.outputs(*inputs(planned, count)), truth.outputs(*inputs(planned, count)), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(engine(*inputs(planned, count)), truth(*inputs(planned, count)))
    assert engine._program is not None
    assert sorted(engine._program._calls) == [1, 2, 4, 8, 16]
    stream = engine._stream
    assert isinstance(stream, HostStream)
    assert stream.graphs == 5


def test_mixtures_of_classes_are_padded_and_split_as_ids_are(engine: TensorRtEngine, planned: Bundle) -> None:
    truth = open_engine(planned, ONNX)
    assert engine.mixes_classes
    for count in (1, 3, 37):
        z, class_ids = inputs(planned, count)
        assert class_ids is not None
        mixture = mix_classes(planned.spec, class_ids.tolist(), 3, np.linspace(0, 1, count))
        for found, expected in zip(engine.outputs(z, mixture), truth.outputs(z, mixture), strict=True):
            np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(engine(z, class_ids), truth(z, class_ids))  # nothing is left of the mixture


def test_its_buffers_are_never_handed_out(engine: TensorRtEngine, planned: Bundle) -> None:
    z, class_ids = inputs(planned, 8)
    first = engine.outputs(z, class_ids)
    kept = first.pixels.copy(), first.images.copy()
    engine.outputs(-z, class_ids)
    np.testing.assert_array_equal(first.pixels, kept[0])
    np.testing.assert_array_equal(first.images, kept[1])


def test_threads_take_turns(engine: TensorRtEngine, planned: Bundle) -> None:
    calls = [inputs(planned, count) for count in (1, 5, 16, 33) * 4]
    expected = [engine(*call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda call: engine(*call), calls), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_wrong_input_and_a_closed_engine(engine: TensorRtEngine, planned: Bundle) -> None:
    z, class_ids = inputs(planned, 4)
    assert class_ids is not None
    with pytest.raises(RequestError, match=r"B >= 1"):
        engine(z[:0], class_ids[:0])
    with pytest.raises(RequestError, match=r"outside 0\.\.9"):
        engine(z, class_ids + 7)
    engine.close()
    with pytest.raises(AssertionError, match="the engine was closed"):
        engine(z, class_ids)


def test_a_plan_of_another_version_says_which(planned: Bundle) -> None:
    record = EngineRecord.read(planned.engine_folder(PLAN))
    check_version(record, "11.0")
    with pytest.raises(
        BundleError,
        match=r"runs only with tensorrt 11\.0, which built it, and tensorrt 11\.1 is installed; export it again, or pip",
    ):
        check_version(record, "11.1")
    with pytest.raises(BundleError, match="lacks the version of tensorrt that built it; export the engine again"):
        check_version(replace(record, versions={}), "11.1")


def test_a_plan_for_another_gpu_is_refused_and_the_others_are_not(planned: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    here = (Gpu("NVIDIA GeForce RTX 5090", 120),)
    for module in (device, runtime):
        monkeypatch.setattr(module, "gpus", lambda: here)
    monkeypatch.setattr(runtime.Runtime, "is_installed", lambda self: True)
    monkeypatch.setattr(runtime, "version", lambda name: f"1.0{'+cpu' * (name == 'torch')}")
    monkeypatch.setattr(runtime, "RUNTIMES", runtime.RUNTIMES)
    problem = r"engine tensorrt-fp32-sm89 runs only on GPUs of compute capability sm89, and cuda:0 \(NVIDIA .* 5090\) has sm120"
    with pytest.raises(RequestError, match=problem + "; export it with --to tensorrt --sm 120, or use another engine"):
        select_engine(planned, "tensorrt")
    assert engine_status(planned, PLAN).state == "absent"


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'uni-instruct\[gpu\]'"):
        load_package(PLAN)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'uni-instruct\[tensorrt-rtx\]'"):
        load_package(RTX)


@without_gpu
def test_without_a_driver_there_is_no_gpu_and_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libno-such-driver.so.1")
    cuda._driver.cache_clear()
    cuda.gpus.cache_clear()
    assert cuda.gpus() == ()


@pytest.fixture(scope="module")
def built(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with a plan that TensorRT-RTX has built, for a GPU that need not be here."""
    path = shutil.copytree(exported_bundle.path, tmp_path_factory.mktemp("built") / "bundle")
    export_engine(Bundle.open(path), str(RTX))
    return Bundle.open(path)


@needs_rtx
@without_gpu
def test_a_plan_is_built_without_its_gpu_and_stays_untried(built: Bundle, cli: Cli) -> None:
    record = EngineRecord.read(built.engine_folder(RTX))
    assert (record.file, record.batch_profile, record.parity) == ("tiny-8x8-tensorrt-rtx-fp16-sm89.plan", (1, 16, 64), {})
    assert record.versions["tensorrt_rtx"]
    code, output, _ = cli("inspect", built.path)
    assert code == 0
    assert "built but not yet checked, because this machine lacks its GPU; the machine that runs it checks it first" in output
    assert "cannot run here: engine tensorrt-rtx-fp16-sm89 needs a CUDA device, and this process sees none" in output
    for wanted in ("tensorrt-rtx", str(RTX)):
        code, _, error = cli("generate", built.path, "--seeds", "0", "--engine", wanted, "--out", built.path.parent / "out")
        assert code == 2
        assert error.startswith("error: engine tensorrt-rtx-fp16-sm89 needs a CUDA device, and this process sees none; use an")
    assert select_engine(built).engine_id.runtime != "tensorrt-rtx"  # without a word another engine is taken


@needs_rtx
@without_gpu
@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda plan: plan, "CUDA"),  # whole, but no GPU: deserialising gives None, and no exception
        (lambda plan: b"", "malformed engine"),
        (lambda plan: b"no plan at all" * 100, "malformed engine"),
    ],
    ids=["whole", "empty", "foreign"],
)
def test_what_cannot_be_deserialised_is_refused_in_tensorrts_words(
    alter: Callable[[bytes], bytes], reason: str, built: Bundle, tmp_path: Path
) -> None:
    file = tmp_path / "altered.plan"
    file.write_bytes(alter(built.engines()[RTX].file().read_bytes()))
    with pytest.raises(BundleError, match=rf"tensorrt_rtx [0-9.]+ cannot load {file}: .*{reason}"):
        deserialised(load_package(RTX), file)


@needs_rtx
def test_an_altered_plan_and_one_of_other_weights_never_run(built: Bundle, tmp_path: Path) -> None:
    path = shutil.copytree(built.path, tmp_path / "bundle")
    stored = Bundle.open(path).engines()[RTX]
    plan = stored.file()
    plan.write_bytes(plan.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"does not match the sha256 in engine\.json"):
        stored.file()
    values = json.loads((stored.folder / RECORD).read_text())
    (stored.folder / RECORD).write_text(json.dumps(values | {"weights_sha256": "0" * 64}))
    with pytest.raises(BundleError, match="was built from other weights than those in"):
        stored.record()
