"""OpenVINO's files: ONNX as it is, or OpenVINO's own two files, graph and weights, side by side in one zip. Needs no torch.

The zip keeps an engine one file with one hash; unpacked, any OpenVINO program reads it.
"""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

GRAPH, WEIGHTS = "model.xml", "model.bin"
SUFFIX = "zip"


def read_model(core: "openvino.Core", file: Path) -> "openvino.Model":
    """The graph of an engine's file. Raises what OpenVINO, zipfile and the file system raise."""
    if file.suffix != f".{SUFFIX}":
        return core.read_model(file)
    with zipfile.ZipFile(file) as archive:
        return core.read_model(archive.read(GRAPH), archive.read(WEIGHTS))


def pack(graph: bytes, weights: Path, file: Path) -> None:
    """Writes the zip; the same graph and weights give the same bytes."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in ((GRAPH, graph), (WEIGHTS, weights)):
            # Stored, with a fixed time: weights do not compress, and the hash is to say what is inside.
            entry = zipfile.ZipInfo(name)
            with archive.open(entry, "w", force_zip64=True) as target:
                if isinstance(content, bytes):
                    target.write(content)
                    continue
                with content.open("rb") as source:
                    while chunk := source.read(1 << 20):
                        target.write(chunk)


def weight_name(layer: "openvino.Node") -> str:
    """The name of the constant that a layer's weights are, behind what widens or quantizes them when the file is loaded."""
    source = layer.input_value(1).get_node()
    while source.get_type_name() != "Constant" and source.get_input_size():
        source = source.input_value(0).get_node()
    return str(source.get_friendly_name()).removesuffix(".fp16")
