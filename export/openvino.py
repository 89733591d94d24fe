"""The engines for OpenVINO: everything four-dimensional, as it pays for every change of layout.

In fp32 the file stays ONNX, which OpenVINO reads as it is. bf16 and int8 need what ONNX cannot say: which layers keep float32,
and which are quantized. So they are OpenVINO's own two files in one zip (engines/openvino_file.py).
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import openvino

from uni_instruct.bundle import Bundle
from uni_instruct.engines.openvino import check_precision
from uni_instruct.engines.openvino_file import pack
from uni_instruct.engines.record import EngineId
from uni_instruct.export.canonical_blocks import FourDimensionalNorm
from uni_instruct.export.graph import write_graph
from uni_instruct.export.mixed_precision import with_float32_marks
from uni_instruct.export.quantize import check_installed, quantized, versions


def check_machine(precision: str) -> None:
    """Raises RequestError where this processor does not have the precision: an engine is admitted where it has run."""
    if precision == "int8":
        check_installed()
    check_precision(EngineId("openvino", precision))


def build(bundle: Bundle, path: Path, precision: str) -> dict[str, str]:
    """Writes the engine's file. Returns the versions of the tools. Raises RequestError for weights too large for one file."""
    return {**_BUILDERS[precision](bundle, path), "openvino": openvino.__version__}


def _build_fp32(bundle: Bundle, path: Path) -> dict[str, str]:
    return write_graph(bundle, path, FourDimensionalNorm)


def _build_bf16(bundle: Bundle, path: Path) -> dict[str, str]:
    """The same graph with the layers marked that keep float32."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        tools = write_graph(bundle, Path(scratch, "graph.onnx"), FourDimensionalNorm, round_weights=True)
        model = openvino.Core().read_model(Path(scratch, "graph.onnx"))
        graph, weights = _serialized(model, Path(scratch))
        pack(with_float32_marks(graph, bundle), weights, path)
    return tools


def _build_int8(bundle: Bundle, path: Path) -> dict[str, str]:
    """The graph with its large 3x3 convolutions in int8, calibrated on the generator's own noise and classes."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        tools = write_graph(bundle, Path(scratch, "graph.onnx"), FourDimensionalNorm)
        model = quantized(openvino.Core().read_model(Path(scratch, "graph.onnx")), bundle)
        pack(*_serialized(model, Path(scratch)), path)
    return {**tools, **versions()}


def _serialized(model: openvino.Model, folder: Path) -> tuple[bytes, Path]:
    """OpenVINO's two files: the graph's content, and the path of the weights."""
    openvino.serialize(model, folder / "model.xml", folder / "model.bin")
    return (folder / "model.xml").read_bytes(), folder / "model.bin"


_BUILDERS: dict[str, Callable[[Bundle, Path], dict[str, str]]] = {"fp32": _build_fp32, "bf16": _build_bf16, "int8": _build_int8}
