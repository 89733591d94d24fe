"""Marks in OpenVINO's graph: which layers keep float32 where the engine computes in bf16.

Left to itself OpenVINO stores whatever lies between two layers in bf16, which costs most accuracy (docs/export.md, "bf16").
So only large convolutions and matrix products round; sums, normalisation and what is sensitive keep 32 bits.
"""

import xml.etree.ElementTree as ElementTree

from uni_instruct.bundle import Bundle
from uni_instruct.engines.sensitive_layers import sensitive_layers

# OpenVINO's attribute for a layer that must not be computed in less; its CPU plugin then leaves bf16 out as well
# (openvino 2026.4, src/plugins/intel_cpu/src/node.cpp, keepOriginalPrecision).
MARK = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}
_NO_ARITHMETIC = ("Parameter", "Const", "Result", "Convert")


def with_float32_marks(graph: bytes, bundle: Bundle) -> bytes:
    """The graph's XML with every layer marked but the large convolutions and matrix products that round well."""
    root = ElementTree.fromstring(graph)
    layers = {layer.attrib["id"]: layer for layer in root.iter("layer")}
    sources = {
        (edge.attrib["to-layer"], edge.attrib["to-port"]): layers[edge.attrib["from-layer"]] for edge in root.iter("edge")
    }
    convolutions = [layer for layer in layers.values() if layer.attrib["type"] == "Convolution" and not _is_of_means(layer)]
    named = [(weight_name(layer, sources), weight_shape(layer)) for layer in convolutions]
    kept = {convolutions[i].attrib["id"] for i in sensitive_layers(named, bundle.spec)}
    rounded = {layer.attrib["id"] for layer in convolutions} - kept
    rounded |= {layer.attrib["id"] for layer in layers.values() if layer.attrib["type"] == "MatMul"}
    for layer in layers.values():
        if layer.attrib["id"] not in rounded and layer.attrib["type"] not in _NO_ARITHMETIC:
            _mark(layer)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def weight_name(layer: ElementTree.Element, sources: dict[tuple[str, str], ElementTree.Element]) -> str:
    """The name of the constant that a convolution's weights are, behind the Convert that widens half weights."""
    source = sources[layer.attrib["id"], "1"]
    while source.attrib["type"] != "Const" and (source.attrib["id"], "0") in sources:
        source = sources[source.attrib["id"], "0"]
    return source.attrib["name"].removesuffix(".fp16")


def weight_shape(layer: ElementTree.Element) -> tuple[int, ...]:
    """[out, in, height, width]."""
    return tuple(int(dim.text or 0) for dim in layer.findall("input/port")[1].findall("dim"))


def _is_of_means(layer: ElementTree.Element) -> bool:
    """Whether it sums a normalisation's means: its image is one pixel."""
    return [dim.text for dim in layer.findall("input/port")[0].findall("dim")][2:] == ["1", "1"]


def _mark(layer: ElementTree.Element) -> None:
    notes = layer.find("rt_info")
    if notes is None:
        notes = ElementTree.Element("rt_info")
        # OpenVINO writes the notes behind a layer's data, before its ports.
        layer.insert(1 if layer.find("data") is not None else 0, notes)
    ElementTree.SubElement(notes, "attribute", MARK)
