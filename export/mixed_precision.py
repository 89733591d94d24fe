"""Which layers of OpenVINO's graph keep float32 where the engine computes in bf16: marks in the graph, and what keeps them.

Left to itself OpenVINO stores whatever lies between two layers in bf16, which costs most accuracy (docs/export.md, "bf16").
So only large convolutions and matrix products round; sums, normalisation and what is sensitive keep 32 bits.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Collection

import numpy as np
import openvino
import openvino.opset13 as ops
from openvino._offline_transformations import apply_moc_transformations
from openvino.utils.node_factory import NodeFactory

from uni_instruct.bundle import Bundle
from uni_instruct.engines.openvino_file import weight_name
from uni_instruct.engines.sensitive_layers import sensitive_layers

# OpenVINO's attribute for a layer that must not be computed in less; its CPU plugin then leaves bf16 out as well
# (openvino 2026.4, src/plugins/intel_cpu/src/node.cpp, keepOriginalPrecision).
MARK = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}
_NO_ARITHMETIC = ("Parameter", "Const", "Result", "Convert")
# What may stand between a norm and a large convolution, which rounds what it reads in any case.
_PASSES_ROUNDED = ("Swish", "Interpolate", "AvgPool", "FakeQuantize")
# Far above what any layer gives: a clamp to it changes nothing.
_LIMIT = 1e30
_NEAREST = {
    "mode": "nearest",
    "shape_calculation_mode": "scales",
    "coordinate_transformation_mode": "asymmetric",
    "nearest_mode": "floor",
    "antialias": False,
    "pads_begin": [0],
    "pads_end": [0],
    "cube_coeff": -0.75,
}


def convolutions(model: openvino.Model) -> list[openvino.Node]:
    """The network's own, in the order of their work: without those that sum a normalisation's means, of one pixel."""
    found = [layer for layer in model.get_ordered_ops() if layer.get_type_name() == "Convolution"]
    return [layer for layer in found if [str(size) for size in layer.get_input_partial_shape(0)][2:] != ["1", "1"]]


def rounded_convolutions(
    model: openvino.Model, bundle: Bundle, *, last_block: bool = False, first_block: bool = True
) -> set[str]:
    """Names of the convolutions that round well. The blocks that are kept: as in `sensitive_layers`."""
    layers = convolutions(model)
    named = [(weight_name(layer), tuple(layer.input(1).get_shape())) for layer in layers]
    kept = sensitive_layers(named, bundle.spec, last_block=last_block, first_block=first_block)
    return {layer.get_friendly_name() for i, layer in enumerate(layers) if i not in kept}


def prepare(model: openvino.Model, rounded: Collection[str]) -> None:
    """Puts the graph into the form in which marks hold; rounded: the names of the convolutions that may round.

    OpenVINO replaces some layers by others when it compiles, and a mark is lost with its layer. What it would replace is
    replaced here; where it cannot be, a clamp that does nothing, marked, fused into the layer, says what precision comes out.
    """
    apply_moc_transformations(model, False)
    rounded = set(rounded)
    for layer in model.get_ordered_ops():
        if layer.get_type_name() == "Interpolate":
            _replace(layer, _nearest(layer))
        elif layer.get_type_name() == "Convolution" and layer.get_friendly_name() in rounded:
            _give_32_bits(layer)
        elif layer.get_type_name() == "Swish" and not _readers(layer) & rounded:
            insert_neutral_clamp(layer)
    model.validate_nodes_and_infer_types()


def with_float32_marks(graph: bytes, rounded: Collection[str]) -> bytes:
    """The graph's XML with every layer marked but those convolutions, matrix products, and what only such convolutions read."""
    root = ElementTree.fromstring(graph)
    layers = {layer.attrib["id"]: layer for layer in root.iter("layer")}
    readers: dict[str, set[str]] = {}
    for edge in root.iter("edge"):
        readers.setdefault(edge.attrib["from-layer"], set()).add(edge.attrib["to-layer"])
    free = {i for i, layer in layers.items() if layer.attrib["name"] in rounded}
    size = 0
    while size < len(free):
        size = len(free)
        passing = {i for i, layer in layers.items() if layer.attrib["type"] in _PASSES_ROUNDED}
        free |= {i for i in passing if readers[i] <= free}
    free |= {i for i, layer in layers.items() if layer.attrib["type"] == "MatMul"}
    for i, layer in layers.items():
        if i not in free and layer.attrib["type"] not in _NO_ARITHMETIC:
            _mark(layer)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _readers(layer: openvino.Node) -> set[str]:
    return {port.get_node().get_friendly_name() for port in layer.output(0).get_target_inputs()}


def _give_32_bits(convolution: openvino.Node) -> None:
    """Behind the bias, which becomes part of the convolution and leaves it as it is: nothing else says what comes out."""
    readers = [port.get_node() for port in convolution.output(0).get_target_inputs()]
    if len(readers) == 1 and readers[0].get_type_name() == "Add":
        behind = [port.get_node() for port in readers[0].output(0).get_target_inputs()]
        if len(behind) > 1 or behind[0].get_type_name() != "Add":  # a sum that is marked is fused as well
            insert_neutral_clamp(readers[0])


def insert_neutral_clamp(layer: openvino.Node) -> None:
    """Puts a clamp behind the layer that changes no value, but that OpenVINO's transformations do not look through."""
    readers = list(layer.output(0).get_target_inputs())
    clamp = ops.clamp(layer, -_LIMIT, _LIMIT)
    clamp.set_friendly_name(f"{layer.get_friendly_name()}/float32")
    for port in readers:
        port.replace_source_output(clamp.output(0))


def _nearest(layer: openvino.Node) -> openvino.Node:
    """The same upsampling by 2 in the version that OpenVINO's CPU plugin computes; a newer one it replaces."""
    sizes, scales, axes = np.array([1, 1], np.int32), np.array([2, 2], np.float32), np.array([2, 3], np.int32)
    inputs = [layer.input_value(0), *(ops.constant(values).output(0) for values in (sizes, scales, axes))]
    return NodeFactory("opset4").create("Interpolate", inputs, _NEAREST)


def _replace(layer: openvino.Node, new: openvino.Node) -> None:
    new.set_friendly_name(layer.get_friendly_name())
    for port in list(layer.output(0).get_target_inputs()):
        port.replace_source_output(new.output(0))


def _mark(layer: ElementTree.Element) -> None:
    notes = layer.find("rt_info")
    if notes is None:
        notes = ElementTree.Element("rt_info")
        # OpenVINO writes the notes behind a layer's data, before its ports.
        layer.insert(1 if layer.find("data") is not None else 0, notes)
    ElementTree.SubElement(notes, "attribute", MARK)
