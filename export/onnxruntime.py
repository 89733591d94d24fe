"""The graph for ONNX Runtime: group normalisation as torch has it, which its CPU kernels are fast at.

fp16 is meant for GPUs. On a CPU ONNX Runtime casts to fp32 and back around every layer, so that it is right there, and slow.
"""

import copy
from pathlib import Path

import onnxruntime

from uni_instruct.bundle import Bundle
from uni_instruct.export.graph import write_graph


def check_machine(precision: str) -> None:
    """Nothing to check: its graphs run on every machine."""


def build(bundle: Bundle, path: Path, precision: str) -> dict[str, str]:
    """Writes the engine's file. Returns the versions of the tools. Raises RequestError for weights too large for one file."""
    return {
        **write_graph(bundle, path, copy.deepcopy, precision=precision, bytes_last=precision != "fp32", optional_mixture=True),
        "onnxruntime": onnxruntime.__version__,
    }
