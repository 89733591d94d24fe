"""Builds an OpenVINO engine (OpenVINO's own two files in one zip) from an ONNX graph, in a process of its own.

`openvino.py` calls it as `python -m uni_instruct.export.openvino_worker BUNDLE PRECISION WAY GRAPH PATH`. Quantizing holds the
weights in memory three times. In a new process, the memory that torch and its exporter keep is not added to that.
"""

import sys
import tempfile
from pathlib import Path

import openvino

from uni_instruct.bundle import Bundle
from uni_instruct.engines.openvino_file import pack
from uni_instruct.export.mixed_precision import prepare, rounded_convolutions, with_float32_marks
from uni_instruct.export.quantize import quantized
from uni_instruct.system.processes import release_freed_memory, release_large_blocks

ALL_BF16 = "all layers in bf16"
# Way -> arguments of `sensitive_layers`: which convolutions keep float32. In these ways, sums and norms keep it too.
FLOAT32_CONVOLUTIONS = {
    "convolutions in bf16": {"first_block": False},
    "most convolutions in bf16": {},
    "convolutions in bf16, except those of the first and the last block": {"last_block": True},
}
# int8's most exact way: the first quarter of its convolutions stay in bf16. They do few of the FLOPs (6 % in fashion-mnist)
# and gain about 1 dB of PSNR (docs/export.md, "int8").
FIRST_QUARTER_BF16 = "convolutions in bf16, including the first quarter of those for int8"
# NNCF imports these, if installed, to find out whether the graph is one of theirs. That takes 200 MB, so it is prevented.
_NOT_NEEDED = ("torch", "onnx")


def main(bundle_path: str, precision: str, way: str, graph: str, path: str) -> None:
    """Write the engine's file.

    In int8 engines the other layers may run in bf16 if the processor has it: beside the error of 8 bits, that costs nothing.
    """
    bundle = Bundle.open(bundle_path)
    model = openvino.Core().read_model(graph)
    release_freed_memory()  # what reading the file took
    kept = FLOAT32_CONVOLUTIONS["convolutions in bf16" if way == FIRST_QUARTER_BF16 else way] if way != ALL_BF16 else None
    rounded = None if kept is None else rounded_convolutions(model, bundle, **kept)
    if precision == "int8":
        model = quantized(model, bundle, skip_share=0.25 if way == FIRST_QUARTER_BF16 else 0.0)
        release_freed_memory()  # the weights in float32
    write_engine(model, rounded, Path(path))


def write_engine(model: openvino.Model, rounded: set[str] | None, path: Path) -> None:
    """Write OpenVINO's two files into one zip, with a mark on every layer that must keep float32.

    rounded: names of the convolutions that may run in bf16; None if everything may.
    """
    if rounded is not None:
        prepare(model, rounded)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        graph, weights = Path(scratch, "model.xml"), Path(scratch, "model.bin")
        openvino.serialize(model, graph, weights)
        content = graph.read_bytes()
        pack(content if rounded is None else with_float32_marks(content, rounded), weights, path)


if __name__ == "__main__":
    release_large_blocks()
    sys.modules.update(dict.fromkeys(_NOT_NEEDED))  # type: ignore[arg-type]
    main(*sys.argv[1:])
