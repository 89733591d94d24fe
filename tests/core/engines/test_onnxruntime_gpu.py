"""ONNX Runtime as it runs on a GPU, as far as a machine without one can tell: the same way through memory of the CPU."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from builders.bundles import ONNX
from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.engines import onnxruntime as onnx_engine
from uni_instruct.engines.hardware.cuda import gpus
from uni_instruct.engines.onnxruntime import RTX_PLUGIN, TENSORRT, BoundBatches, OnnxEngine
from uni_instruct.errors import MissingExtraError, RequestError
from uni_instruct.generate import mix_classes
from uni_instruct.noise import noise, round_robin_class_ids


@pytest.fixture
def bound(exported_bundle: Bundle) -> OnnxEngine:
    """The engine, with the inputs and outputs of each batch size in a place of their own, as on a GPU."""
    engine = OnnxEngine(exported_bundle, exported_bundle.engines()[ONNX])
    assert engine._session is not None
    engine._batches = BoundBatches(engine._session, "cpu", most=16)
    return engine


def inputs(engine: OnnxEngine, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    return noise(range(count), engine.spec.noise_shape), round_robin_class_ids(engine.spec, count)


def test_bound_memory_gives_the_same_images_at_fixed_batch_sizes(bound: OnnxEngine, exported_bundle: Bundle) -> None:
    plain = open_engine(exported_bundle, ONNX, device="cpu")
    for count in (1, 3, 16, 37):  # more than 16 are split
        found, expected = bound.outputs(*inputs(bound, count)), plain.outputs(*inputs(bound, count))
        np.testing.assert_array_equal(found.pixels, expected.pixels)
        np.testing.assert_array_equal(found.images, expected.images)
    assert bound._batches is not None
    assert sorted(bound._batches._bound) == [1, 4, 8, 16]  # 37 are 16, 16 and 5 in a batch of 8


def test_bound_memory_forgets_a_mixture_of_classes(bound: OnnxEngine, exported_bundle: Bundle) -> None:
    plain = open_engine(exported_bundle, ONNX, device="cpu")
    z, class_ids = inputs(bound, 3)
    assert class_ids is not None
    mixture = mix_classes(bound.spec, class_ids.tolist(), 7, [0, 0.4, 1])
    for classes in (mixture, class_ids, mixture[1:]):
        count = len(classes)
        np.testing.assert_array_equal(bound.outputs(z[:count], classes).images, plain.outputs(z[:count], classes).images)


def test_bound_memory_is_never_handed_out(bound: OnnxEngine) -> None:
    first = bound.outputs(*inputs(bound, 4))
    kept = first.pixels.copy(), first.images.copy()
    bound.outputs(-inputs(bound, 4)[0], inputs(bound, 4)[1])
    np.testing.assert_array_equal(first.pixels, kept[0])
    np.testing.assert_array_equal(first.images, kept[1])


def test_threads_take_turns(bound: OnnxEngine) -> None:
    calls = [inputs(bound, count) for count in (1, 5, 16, 33) * 4]
    expected = [bound(*call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda call: bound(*call), calls), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.skipif(bool(gpus()), reason="a GPU is here")
@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", TENSORRT])
def test_a_provider_that_is_not_there_is_refused_and_never_replaced(provider: str, exported_bundle: Bundle) -> None:
    with pytest.raises(
        RequestError, match=f"ONNX Runtime could not load {provider}, and fell back to CPUExecutionProvider; install"
    ):
        OnnxEngine(exported_bundle, exported_bundle.engines()[ONNX], device="cuda:0", provider=provider)


def test_a_build_without_cuda_takes_the_plugin_or_names_it(exported_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build has CUDA")
    monkeypatch.setitem(sys.modules, RTX_PLUGIN, None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime_ep_nv_tensorrt_rtx.*\[tensorrt-rtx\]"):
        OnnxEngine(exported_bundle, exported_bundle.engines()[ONNX], device="cuda:0")


def test_the_plugin_without_its_gpu_is_refused(exported_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that finds nothing: ONNX Runtime's own list of devices, which has none of that name here."""
    plugin = ModuleType(RTX_PLUGIN)
    vars(plugin).update(get_ep_name=lambda: onnx_engine.TENSORRT_RTX, get_library_path=lambda: "/nowhere.so")
    monkeypatch.setitem(sys.modules, RTX_PLUGIN, plugin)
    runtime = SimpleNamespace(get_ep_devices=onnxruntime.get_ep_devices, register_execution_provider_library=lambda *_: None)
    with pytest.raises(RequestError, match="supports none of this machine's GPUs, and cuda:0 was asked for"):
        onnx_engine._add_plugin(runtime, onnxruntime.SessionOptions(), 0)
