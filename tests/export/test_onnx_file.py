"""The ONNX file that is written part by part is the one that onnx itself would write."""

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from uni_instruct.export.onnx_file import write_model  # noqa: E402

# Sizes on both sides of where protobuf's lengths take another byte.
SIZES = (1, 31, 32, 4095, 4096, 530_000)


def test_weights_written_behind_the_graph_are_its_initializers(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    weights = {f"w{size}": random.normal(size=(size, 1)).astype(np.float32) for size in SIZES}
    weights["half"] = random.normal(size=(3, 5, 2)).astype(np.float16)
    weights["turned"] = random.normal(size=(4, 6)).astype(np.float32).T
    expected = dict(weights)
    own = onnx.numpy_helper.from_array(np.array([2.0], np.float32), "own")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Mul", ["own", "w1"], ["y"])], "g", [], [], [own])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    onnx.helper.set_model_props(model, {"a": "b"})
    write_model(model, weights, tmp_path / "model.onnx")
    assert not weights
    read = onnx.load(tmp_path / "model.onnx")
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in read.graph.initializer}
    assert list(found) == ["own", *expected]
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    del read.graph.initializer[1:]
    assert read == model
