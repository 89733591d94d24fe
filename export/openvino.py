"""The engines for OpenVINO: everything four-dimensional, as it pays for every change of layout.

In fp32 the file stays ONNX, which OpenVINO reads as it is. bf16 and int8 need what ONNX cannot say: which layers keep float32,
and which are quantized. So they are OpenVINO's own two files in one zip (engines/openvino_file.py).

How much may be bf16 depends on the generator, and what float32 costs on the processor: where matrix units do convolutions, the
rest is half of the time. So there are several ways, from the fastest to the most exact, and the first that agrees is taken.
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
from uni_instruct.export.mixed_precision import prepare, rounded_convolutions, with_float32_marks
from uni_instruct.export.quantize import check_installed, quantized, versions

EVERYTHING = "all of it in bf16"
# Way -> which convolutions keep float32 (`sensitive_layers`); sums and norms then keep it too.
_KEPT = {
    "convolutions in bf16": {"first_block": False},
    "most convolutions in bf16": {},
    "convolutions in bf16, but the first and the last block's": {"last_block": True},
}
# Precision -> its ways, from the fastest to the most exact.
WAYS = {"bf16": (EVERYTHING, *_KEPT), "int8": (EVERYTHING, "convolutions in bf16")}


def check_machine(precision: str) -> None:
    """Raises RequestError where this processor does not have the precision: an engine is admitted where it has run."""
    if precision == "int8":
        check_installed()
    check_precision(EngineId("openvino", precision))


def build(bundle: Bundle, path: Path, precision: str, way: str = "") -> dict[str, str]:
    """Writes the engine's file. Returns the versions of the tools. Raises RequestError for weights too large for one file.

    way: one of WAYS[precision], where there are any.
    """
    return {**_BUILDERS[precision](bundle, path, way), "openvino": openvino.__version__}


def _build_fp32(bundle: Bundle, path: Path, _: str) -> dict[str, str]:
    return write_graph(bundle, path, FourDimensionalNorm)


def _build_bf16(bundle: Bundle, path: Path, way: str) -> dict[str, str]:
    """The same graph with the layers marked that keep float32."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        tools = write_graph(bundle, Path(scratch, "graph.onnx"), FourDimensionalNorm, weights="rounded")
        model = openvino.Core().read_model(Path(scratch, "graph.onnx"))
        _write(model, _rounded(model, bundle, way), path)
    return tools


def _build_int8(bundle: Bundle, path: Path, way: str) -> dict[str, str]:
    """The graph with its large 3x3 convolutions in int8, calibrated on the generator's own noise and classes.

    What is left out may be bf16 where the processor has it: beside 8 bits that costs nothing.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        # NNCF finds the weights of a convolution only where nothing stands between them, as behind those stored in half.
        tools = write_graph(bundle, Path(scratch, "graph.onnx"), FourDimensionalNorm, weights="wide")
        model = openvino.Core().read_model(Path(scratch, "graph.onnx"))
        rounded = _rounded(model, bundle, way)
        _write(quantized(model, bundle), rounded, path)
    return {**tools, **versions()}


def _rounded(model: openvino.Model, bundle: Bundle, way: str) -> set[str] | None:
    """Names of the convolutions that may be bf16; None where everything may."""
    return None if way == EVERYTHING else rounded_convolutions(model, bundle, **_KEPT[way])


def _write(model: openvino.Model, rounded: set[str] | None, path: Path) -> None:
    """OpenVINO's two files in one, everything marked that is not to be rounded."""
    if rounded is not None:
        prepare(model, rounded)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        graph, weights = Path(scratch, "model.xml"), Path(scratch, "model.bin")
        openvino.serialize(model, graph, weights)
        content = graph.read_bytes()
        pack(content if rounded is None else with_float32_marks(content, rounded), weights, path)


_BUILDERS: dict[str, Callable[[Bundle, Path, str], dict[str, str]]] = {
    "fp32": _build_fp32,
    "bf16": _build_bf16,
    "int8": _build_int8,
}
