"""int8: without NNCF the extra is named; a shift of the distribution is seen; OpenVINO's file is one that it reads back."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.engines.openvino_file import pack, read_model
from uni_instruct.engines.outputs import TOLERANCES, relative_l2
from uni_instruct.errors import MissingExtraError
from uni_instruct.export import quantize
from uni_instruct.export.feature_shift import LARGEST_SHIFT, feature_shift
from uni_instruct.export.mixed_precision import MARK, with_float32_marks
from uni_instruct.export.targets import TARGETS


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
    assert moved > LARGEST_SHIFT
    assert feature_shift(truth[:128], truth) < LARGEST_SHIFT
    assert feature_shift(0.5 * truth, truth) == pytest.approx(0.25, rel=0.01)


def test_the_large_convolutions_are_quantized_and_nothing_else(tmp_path: Path) -> None:
    """On shipped weights: 3x3 convolutions read rounded images, the sensitive ones none; it costs little, and something."""
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    bundle = Bundle.open("digits")
    (onnx,) = (bundle.path / "engines" / "onnx-fp32").glob("*.onnx")
    core = openvino.Core()
    model = quantize.quantized(core.read_model(onnx), bundle)
    rounded = {
        op.get_friendly_name(): op.input_value(0).get_node().get_type_name() == "FakeQuantize"
        for op in model.get_ordered_ops()
        if op.get_type_name() in ("Convolution", "MatMul", "Add", "Multiply")
    }
    shapes = {
        op.get_friendly_name(): tuple(op.input(1).get_shape())[2:]
        for op in model.get_ordered_ops()
        if op.get_type_name() == "Convolution"
    }
    found = [name for name, is_rounded in rounded.items() if is_rounded]
    assert found
    assert {shapes.get(name) for name in found} == {(3, 3)}
    first, *_, last = shapes
    assert not {first, last} & set(found)
    reference = bundle.reference()
    assert reference is not None
    feed = {"noise": reference.noise(bundle.spec), "class_ids": reference.class_ids}
    images = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(feed)["denoised"]
    assert 1e-4 < relative_l2(images, reference.images) < TOLERANCES["int8"].relative_l2


def test_marks_stand_in_the_file_that_openvino_reads(tmp_path: Path) -> None:
    """On shipped weights: every sum and norm is marked, large convolutions are not, and the file is the same graph."""
    openvino = pytest.importorskip("openvino")
    bundle = Bundle.open("digits")
    (onnx,) = (bundle.path / "engines" / "onnx-fp32").glob("*.onnx")
    core = openvino.Core()
    openvino.serialize(core.read_model(onnx), tmp_path / "model.xml", tmp_path / "model.bin")
    marked = with_float32_marks((tmp_path / "model.xml").read_bytes(), bundle)
    pack(marked, tmp_path / "model.bin", tmp_path / "engine.zip")
    model = read_model(core, tmp_path / "engine.zip")
    is_marked = {op.get_friendly_name(): f"{MARK['name']}_0" in list(op.get_rt_info()) for op in model.get_ordered_ops()}
    kinds = {op.get_friendly_name(): op.get_type_name() for op in model.get_ordered_ops()}
    convolutions = [is_marked[name] for name, kind in kinds.items() if kind == "Convolution"]
    assert convolutions[0]
    assert convolutions[-1]
    assert not all(convolutions)
    assert all(is_marked[name] for name, kind in kinds.items() if kind in ("Add", "Multiply", "Swish"))
    assert not any(is_marked[name] for name, kind in kinds.items() if kind == "MatMul")
    reference = bundle.reference()
    assert reference is not None
    feed = {"noise": reference.noise(bundle.spec), "class_ids": reference.class_ids}
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    found, truth = (core.compile_model(m, "CPU", settings)(feed)["denoised"] for m in (model, core.read_model(onnx)))
    np.testing.assert_allclose(found, truth, atol=1e-6)
    pack(marked, tmp_path / "model.bin", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "engine.zip").read_bytes()
    assert ElementTree.fromstring(marked).find("layers") is not None
