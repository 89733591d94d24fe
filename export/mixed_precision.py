"""Mark the layers of OpenVINO's graph that keep float32 in an engine that computes in bf16, in a form that keeps the marks.

By default OpenVINO stores all activations in bf16, which costs most of the accuracy (docs/export.md, "bf16"). Here only large
convolutions and matrix products round to bf16. Sums, normalisation and sensitive convolutions keep float32.
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

# OpenVINO's attribute for a layer that must not be computed in fp16. Its CPU plugin then does not use bf16 for it either
# (openvino 2026.4, src/plugins/intel_cpu/src/node.cpp, keepOriginalPrecision).
MARK = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16"}
# Types of layers that compute nothing, and so need no mark.
_NO_ARITHMETIC = ("Parameter", "Const", "Result", "Convert")
# Types of layers before a convolution that may be in bf16 too: a convolution in bf16 rounds its input in any case.
_PASSES_ROUNDED = ("Swish", "Interpolate", "AvgPool", "FakeQuantize")
# Far above any activation, so that a clamp to it changes nothing.
_LIMIT = 1e30
# Attributes of Interpolate, in its version of opset 4, for upsampling by repeating pixels.
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
    """The network's convolutions, in the order in which they run.

    Convolutions of one pixel are left out: they belong to `FourDimensionalNorm`, which sums means over groups with them.
    """
    found = [layer for layer in model.get_ordered_ops() if layer.get_type_name() == "Convolution"]
    return [layer for layer in found if [str(size) for size in layer.get_input_partial_shape(0)][2:] != ["1", "1"]]


def rounded_convolutions(
    model: openvino.Model, bundle: Bundle, *, last_block: bool = False, first_block: bool = True
) -> set[str]:
    """Names of the convolutions that may run in bf16. last_block, first_block: as in `sensitive_layers`."""
    layers = convolutions(model)
    named = [(weight_name(layer), tuple(layer.input(1).get_shape())) for layer in layers]
    kept = sensitive_layers(named, bundle.spec, last_block=last_block, first_block=first_block)
    return {layer.get_friendly_name() for i, layer in enumerate(layers) if i not in kept}


def prepare(model: openvino.Model, rounded: Collection[str]) -> None:
    """Change the graph, in place, so that OpenVINO keeps the marks. rounded: names of the convolutions that may run in bf16.

    When OpenVINO compiles a graph, it replaces some layers by others, and their marks are lost. So these layers are replaced
    here, before marks are set. If that is impossible, a clamp that changes no value is put behind the layer. The clamp is
    marked; when OpenVINO fuses it into the layer, its mark makes the layer's output float32.
    """
    apply_moc_transformations(model, False)
    rounded = set(rounded)
    for layer in model.get_ordered_ops():
        if layer.get_type_name() == "Interpolate":
            _replace(layer, _nearest(layer))
        elif layer.get_type_name() == "Convolution" and layer.get_friendly_name() in rounded:
            _keep_output_float32(layer)
        elif layer.get_type_name() == "Swish" and not _readers(layer) & rounded:
            insert_neutral_clamp(layer)
    model.validate_nodes_and_infer_types()


def with_float32_marks(graph: bytes, rounded: Collection[str]) -> bytes:
    """The graph's XML, with a mark on every layer except those that may be in bf16.

    These are the convolutions in `rounded`, matrix products, and layers of _PASSES_ROUNDED that only such layers read.
    """
    root = ElementTree.fromstring(graph)
    layers = {layer.attrib["id"]: layer for layer in root.iter("layer")}
    readers: dict[str, set[str]] = {}
    for edge in root.iter("edge"):
        readers.setdefault(edge.attrib["from-layer"], set()).add(edge.attrib["to-layer"])
    free = {i for i, layer in layers.items() if layer.attrib["name"] in rounded}
    size = 0
    # Repeat until nothing is added: a chain of such layers is freed from its end to its beginning.
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


def _keep_output_float32(convolution: openvino.Node) -> None:
    """Make the output of a convolution in bf16 float32, by a neutral clamp behind its bias.

    OpenVINO fuses the bias into the convolution, and the bias's mark is lost. The clamp's mark takes its place.
    """
    readers = [port.get_node() for port in convolution.output(0).get_target_inputs()]
    if len(readers) == 1 and readers[0].get_type_name() == "Add":
        behind = [port.get_node() for port in readers[0].output(0).get_target_inputs()]
        if len(behind) > 1 or behind[0].get_type_name() != "Add":  # a marked sum is fused, and does the same
            insert_neutral_clamp(readers[0])


def insert_neutral_clamp(layer: openvino.Node) -> None:
    """Insert a clamp behind the layer that changes no value, but that OpenVINO's transformations do not see through."""
    readers = list(layer.output(0).get_target_inputs())
    clamp = ops.clamp(layer, -_LIMIT, _LIMIT)
    clamp.set_friendly_name(f"{layer.get_friendly_name()}/float32")
    for port in readers:
        port.replace_source_output(clamp.output(0))


def _nearest(layer: openvino.Node) -> openvino.Node:
    """The same upsampling by 2, in the operator's version that OpenVINO's CPU plugin runs. It would replace a newer one."""
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
        # OpenVINO's order: a layer's data, its rt_info, its ports.
        layer.insert(1 if layer.find("data") is not None else 0, notes)
    ElementTree.SubElement(notes, "attribute", MARK)
