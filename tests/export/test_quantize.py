"""int8: without NNCF the extra is named; a shift of the distribution is seen; OpenVINO's file is one that it reads back."""

from pathlib import Path

import numpy as np
import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.engines.graph_ports import graph_feeds
from uni_instruct.engines.openvino_file import read_model
from uni_instruct.engines.outputs import TOLERANCES, relative_l2
from uni_instruct.errors import MissingExtraError
from uni_instruct.export import mixed_precision, quantize
from uni_instruct.export.feature_shift import MAX_SHIFT, feature_shift
from uni_instruct.export.targets import TARGETS
from uni_instruct.noise import Inputs


def test_without_nncf_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nncf", None)
    for check in (quantize.check_installed, TARGETS["openvino-int8"].check_packages):
        with pytest.raises(MissingExtraError, match=r"package 'nncf' is not installed; pip install 'uni-instruct\[export\]'"):
            check()


def test_the_shift_of_a_distribution_is_seen() -> None:
    draws = np.random.default_rng(0).uniform(-0.8, 0.8, (256, 1, 1, 1))
    truth = draws - draws.mean() + np.zeros((256, 3, 16, 12))
    assert feature_shift(truth, truth) == pytest.approx(0, abs=1e-6)
    # Means moved by d and none else: 48 squares of 3 colours move by d each, of which the variance is that of the draw.
    moved = feature_shift(truth + 0.1, truth)
    assert moved == pytest.approx(0.1**2 / truth[:, 0, 0, 0].var(ddof=1), rel=0.01)
    assert moved > MAX_SHIFT
    assert feature_shift(truth[:128], truth) < MAX_SHIFT
    assert feature_shift(0.5 * truth, truth) == pytest.approx(0.25, rel=0.01)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of shipped weights as the engines for OpenVINO are built from it."""
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    from uni_instruct.export.canonical_blocks import FourDimensionalNorm
    from uni_instruct.export.graph import write_graph

    path = tmp_path_factory.mktemp("graph") / "graph.onnx"
    write_graph(Bundle.open("digits"), path, FourDimensionalNorm, weights="wide")
    return path


@pytest.mark.parametrize("spared", [0.0, 0.25])
def test_the_large_convolutions_are_quantized_and_nothing_else(graph: Path, spared: float) -> None:
    """On shipped weights: 3x3 convolutions read rounded images and weights, sensitive and spared ones not; it costs little."""
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    from uni_instruct.export.mixed_precision import rounded_convolutions

    bundle, core = Bundle.open("digits"), openvino.Core()
    wide = core.read_model(graph)
    chosen = rounded_convolutions(wide, bundle, last_block=True)
    in_order = [layer.get_friendly_name() for layer in mixed_precision.convolutions(wide)]
    model = quantize.quantized(wide, bundle, spared)
    layers = {op.get_friendly_name(): op for op in model.get_ordered_ops()}
    reads_rounded = {
        name
        for name, op in layers.items()
        if op.get_type_name() != "FakeQuantize" and op.get_input_size() and _kind(op.input_value(0)) == "FakeQuantize"
    }
    all_large = [name for name in in_order if name in chosen and tuple(layers[name].input(1).get_shape())[2:] == (3, 3)]
    large = set(all_large[round(spared * len(all_large)) :])
    assert reads_rounded == large
    assert len(large) == len(all_large) if not spared else 0.7 < len(large) / len(all_large) < 0.8
    weights = {name: np.dtype(_stored(layers[name]).get_element_type().to_dtype()) for name in large}
    assert set(weights.values()) == {np.dtype(np.int8)}
    assert len(large) > 4
    found = _denoised(model, bundle, "f32")
    assert 1e-4 < relative_l2(*found) < TOLERANCES["int8"].relative_l2


def test_a_batch_in_parts_gives_the_same_scales(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On shipped weights, as they are stored: whole batches, and two images at a time, which hold less memory."""
    openvino = pytest.importorskip("openvino")
    nncf_factory = pytest.importorskip("nncf.common.factory")
    monkeypatch.setattr(quantize, "CALIBRATION_IMAGES", 16)
    before, stored = nncf_factory.EngineFactory.create, {}
    for part in (quantize.BATCH, 2):
        monkeypatch.setattr(quantize, "PART", part)
        model = quantize.quantized(openvino.Core().read_model(graph), Bundle.open("digits"))
        openvino.serialize(model, tmp_path / "model.xml", tmp_path / "model.bin")
        stored[part] = (tmp_path / "model.bin").read_bytes()
    assert stored[quantize.BATCH] == stored[2]
    assert nncf_factory.EngineFactory.create is before


def test_scales_stay_where_no_bias_follows_a_quantized_convolution() -> None:
    """Without one OpenVINO lost its scale in CIFAR-10's network, and made zeros of the next convolution."""
    openvino = pytest.importorskip("openvino")
    import openvino.opset13 as ops

    x, filters = ops.parameter([1, 4, 8, 8], np.float32), np.ones((4, 4, 3, 3), np.float32)
    ends = [np.float32(end) for end in (-1, 1, -1, 1)]

    def convolution() -> object:
        return ops.convolution(ops.fake_quantize(x, *ends, 256), filters, [1, 1], [1, 1], [1, 1], [1, 1])

    bare = ops.add(convolution(), ops.multiply(x, np.float32(0.5)))
    biased = ops.add(convolution(), np.ones((1, 4, 1, 1), np.float32))
    model = openvino.Model([bare, biased], [x], "two convolutions")
    quantize._keep_scales(model)
    assert [_kind(layer.input_value(0)) for layer in (bare, biased)] == ["Clamp", "Convolution"]


def test_marks_keep_32_bits(graph: Path, tmp_path: Path) -> None:
    """On shipped weights: every sum and norm is marked, large convolutions are not; the engine's file is the same graph."""
    openvino = pytest.importorskip("openvino")
    from uni_instruct.export.openvino_worker import write_engine

    bundle, core = Bundle.open("digits"), openvino.Core()
    wide = core.read_model(graph)
    rounded = mixed_precision.rounded_convolutions(wide, bundle)
    write_engine(wide, rounded, tmp_path / "engine.zip")
    model = read_model(core, tmp_path / "engine.zip")
    layers = model.get_ordered_ops()
    unmarked = [op for op in layers if f"{mixed_precision.MARK['name']}_0" not in list(op.get_rt_info())]
    assert {op.get_friendly_name() for op in unmarked if op.get_type_name() == "Convolution"} == rounded
    assert len(rounded) > 4
    kinds = {op.get_type_name() for op in unmarked}
    assert kinds <= {"Convolution", "MatMul", "Swish", "Interpolate", "AvgPool", "Parameter", "Constant", "Convert", "Result"}
    found, truth = _denoised(model, bundle, "f32")
    np.testing.assert_allclose(found, truth, atol=1e-4)


def test_a_processor_with_bf16_heeds_the_marks(graph: Path, tmp_path: Path) -> None:
    """What OpenVINO runs, as it says itself: bf16 in the convolutions that round well, which give 32 bits; else 32 bits."""
    openvino = pytest.importorskip("openvino")
    from uni_instruct.export.openvino_worker import write_engine

    bundle, core = Bundle.open("digits"), openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor has no bf16")
    wide = core.read_model(graph)
    rounded = mixed_precision.rounded_convolutions(wide, bundle)
    write_engine(wide, rounded, tmp_path / "engine.zip")
    model = read_model(core, tmp_path / "engine.zip")
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    runs = [_as_run(op) for op in compiled.get_runtime_model().get_ordered_ops()]
    convolutions = {name: (reads, gives) for kind, name, reads, gives in runs if kind == "Convolution"}
    assert {name for name, (reads, _) in convolutions.items() if reads == "bf16"} == rounded
    threes = {name for name in rounded if tuple(_named(model, name).input(1).get_shape())[2:] == (3, 3)}
    assert {convolutions[name][1] for name in threes} == {"f32"}
    assert {reads for kind, _, reads, _ in runs if kind in ("Reduce", "Concatenation")} == {"f32"}
    found = relative_l2(*_denoised(model, bundle, "bf16"))
    assert 1e-4 < found < 4e-3  # 4.1e-3 where marks were lost


def _kind(port: object) -> str:
    return str(port.get_node().get_type_name())  # type: ignore[attr-defined]


def _stored(convolution: object) -> object:
    node = convolution.input_value(1).get_node()  # type: ignore[attr-defined]
    while node.get_input_size():
        node = node.input_value(0).get_node()
    return node


def _named(model: object, name: str) -> object:
    return next(op for op in model.get_ordered_ops() if op.get_friendly_name() == name)  # type: ignore[attr-defined]


def _as_run(layer: object) -> tuple[str, str, str, str]:
    """Of a layer as it runs: its kind, the layer it was, what it reads and what it gives."""
    notes = layer.get_rt_info()  # type: ignore[attr-defined]
    found = [str(notes[key].value) if key in notes else "" for key in ("layerType", "runtimePrecision", "outputPrecisions")]
    return found[0], layer.get_friendly_name(), found[1], found[2]  # type: ignore[attr-defined]


def _denoised(model: object, bundle: Bundle, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Its images of the reference's seeds, and torch's."""
    openvino = pytest.importorskip("openvino")
    reference = bundle.reference()
    assert reference is not None
    feed = graph_feeds(Inputs(reference.noise(bundle.spec), reference.class_ids))
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return compiled(feed)["denoised"], reference.images
