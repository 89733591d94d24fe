"""Makes the engine of an ONNX graph, as OpenVINO's own two files in one zip, in a process of its own.

`openvino.py` calls it as `python -m uni_instruct.export.openvino_worker BUNDLE PRECISION WAY GRAPH PATH`. Quantizing holds the
weights three times; what torch and its exporter leave behind must not stand in memory beside them.
"""

import sys
import tempfile
from pathlib import Path

import openvino

from uni_instruct.bundle import Bundle
from uni_instruct.engines.openvino_file import pack
from uni_instruct.export.mixed_precision import prepare, rounded_convolutions, with_float32_marks
from uni_instruct.export.quantize import quantized
from uni_instruct.processes import release_freed_memory, release_large_blocks

EVERYTHING = "all of it in bf16"
# Way -> which convolutions keep float32 (`sensitive_layers`); sums and norms then keep it too.
KEPT = {
    "convolutions in bf16": {"first_block": False},
    "most convolutions in bf16": {},
    "convolutions in bf16, but the first and the last block's": {"last_block": True},
}
# int8's most exact way: the first of its convolutions are left to bf16, where most images are small and few of the FLOPs are.
SPARING = "convolutions in bf16, and the first quarter of int8's"
# NNCF imports these where they are installed, to see whether the graph is one of theirs: 200 MB.
_NOT_NEEDED = ("torch", "onnx")


def main(bundle_path: str, precision: str, way: str, graph: str, path: str) -> None:
    """Writes the engine's file. What is left out of int8 may be bf16 where the processor has it: beside 8 bits that is free."""
    bundle = Bundle.open(bundle_path)
    model = openvino.Core().read_model(graph)
    release_freed_memory()  # of the file's text
    kept = KEPT["convolutions in bf16" if way == SPARING else way] if way != EVERYTHING else None
    rounded = None if kept is None else rounded_convolutions(model, bundle, **kept)
    if precision == "int8":
        model = quantized(model, bundle, spared=0.25 if way == SPARING else 0.0)
        release_freed_memory()  # of the weights in float32
    write_engine(model, rounded, Path(path))


def write_engine(model: openvino.Model, rounded: set[str] | None, path: Path) -> None:
    """OpenVINO's two files in one, everything marked that is not to be rounded.

    rounded: names of the convolutions that may be bf16; None where everything may.
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
