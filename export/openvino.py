"""The graph for OpenVINO: everything four-dimensional, as it pays for every change of layout.

The file stays ONNX, which OpenVINO reads as it is: one file, one hash, where its own form is two files.
"""

from pathlib import Path

import openvino

from uni_instruct.bundle import Bundle
from uni_instruct.engines.openvino import check_precision
from uni_instruct.engines.record import EngineId
from uni_instruct.export.canonical_blocks import FourDimensionalNorm
from uni_instruct.export.graph import write_graph


def check_machine(precision: str) -> None:
    """Raises RequestError where this processor does not have the precision: an engine is admitted where it has run."""
    check_precision(EngineId("openvino", precision))


def build(bundle: Bundle, path: Path, precision: str) -> dict[str, str]:
    """Writes the engine's file. Returns the versions of the tools. Raises RequestError for weights too large for one file."""
    versions = write_graph(bundle, path, FourDimensionalNorm, round_weights=precision != "fp32")
    return {**versions, "openvino": openvino.__version__}
