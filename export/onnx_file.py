"""Write an ONNX file in parts, to save memory: a protobuf message of all weights would be a second copy, its bytes a third."""

from pathlib import Path

import numpy as np
import onnx

# Field numbers in onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data.
_GRAPH, _INITIALIZER, _BYTES = 7, 5, 9
# Protobuf's wire type of length-delimited fields.
_WITH_LENGTH = 2


def write_model(model: onnx.ModelProto, weights: dict[str, np.ndarray], path: Path) -> None:
    """Write the model with these weights as further initializers. Removes each from the dict once it is written.

    A protobuf message is a sequence of fields in any order. So the weights can follow the bytes of `model`'s graph.
    """
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    graph = model.graph.SerializeToString()
    heads = {name: _head_of_tensor(name, array) for name, array in weights.items()}
    size = len(graph) + sum(len(head) + weights[name].nbytes for name, head in heads.items())
    with path.open("wb") as file:
        file.write(rest.SerializeToString() + _head(_GRAPH, size) + graph)
        for name, head in heads.items():
            file.write(head)
            file.write(np.ascontiguousarray(weights.pop(name)).view(np.uint8).data)


def _head_of_tensor(name: str, array: np.ndarray) -> bytes:
    """The bytes of an initializer up to the array's own: field heads, name, shape and type."""
    about = onnx.TensorProto(
        name=name, dims=array.shape, data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    ).SerializeToString()
    inner = about + _head(_BYTES, array.nbytes)
    return _head(_INITIALIZER, len(inner) + array.nbytes) + inner


def _head(field: int, length: int) -> bytes:
    """The bytes before a length-delimited field's content: field number and wire type, then the length."""
    return _varint(field << 3 | _WITH_LENGTH) + _varint(length)


def _varint(number: int) -> bytes:
    """A protobuf varint: seven bits per byte, lowest first; the eighth bit is set if more bytes follow."""
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])
