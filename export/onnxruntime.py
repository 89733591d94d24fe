"""Build the engine for ONNX Runtime: an ONNX graph with torch's form of group normalisation, for which it has fast CPU kernels.

fp16 is meant for GPUs. On a CPU, ONNX Runtime casts to fp32 and back around every layer: the results are right, but slow.
"""

import copy
from pathlib import Path

import onnxruntime

from uni_instruct.bundle import Bundle
from uni_instruct.export.graph import write_graph


def check_machine(precision: str) -> None:
    """Checks nothing, as these graphs run on every machine. All target modules have this function."""


def build(bundle: Bundle, path: Path, precision: str) -> dict[str, str]:
    """Write the engine's file. Returns the tools' versions. Raises RequestError if the weights do not fit into one file."""
    return {
        **write_graph(bundle, path, copy.deepcopy, precision=precision, cast_last=precision != "fp32", optional_mixture=True),
        "onnxruntime": onnxruntime.__version__,
    }
