"""The file of an OpenVINO engine: ONNX, or OpenVINO's own two files, graph and weights, in one zip. Needs no torch.

The zip makes the engine one file with one hash. Unpacked, any OpenVINO program can read it.
"""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

GRAPH, WEIGHTS = "model.xml", "model.bin"
SUFFIX = "zip"


def read_model(core: "openvino.Core", file: Path) -> "openvino.Model":
    """Read the graph from an engine's file. Raises what OpenVINO, zipfile and the file system raise."""
    if file.suffix != f".{SUFFIX}":
        return core.read_model(file)
    with zipfile.ZipFile(file) as archive:
        return core.read_model(archive.read(GRAPH), archive.read(WEIGHTS))


def pack(graph: bytes, weights: Path, file: Path) -> None:
    """Write the zip. The same graph and weights always yield the same bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in ((GRAPH, graph), (WEIGHTS, weights)):
            # Not compressed, as weights do not shrink. ZipInfo's fixed date keeps the hash a function of the content alone.
            entry = zipfile.ZipInfo(name)
            with archive.open(entry, "w", force_zip64=True) as target:
                if isinstance(content, bytes):
                    target.write(content)
                    continue
                with content.open("rb") as source:
                    while chunk := source.read(1 << 20):
                        target.write(chunk)


def weight_name(layer: "openvino.Node") -> str:
    """The name of a layer's weights: of the constant before the nodes that widen or quantize it when the file is loaded."""
    source = layer.input_value(1).get_node()
    while source.get_type_name() != "Constant" and source.get_input_size():
        source = source.input_value(0).get_node()
    return str(source.get_friendly_name()).removesuffix(".fp16")
