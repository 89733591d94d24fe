"""An ONNX file written part by part: a message that holds all weights would be a second copy of them, its bytes a third."""

from pathlib import Path

import numpy as np
import onnx

# Of onnx.proto: the fields that hold a model's graph, a graph's initializers, a tensor's bytes.
_GRAPH, _INITIALIZER, _BYTES = 7, 5, 9
# Protobuf's wire type of a field with a length.
_WITH_LENGTH = 2


def write_model(model: onnx.ModelProto, weights: dict[str, np.ndarray], path: Path) -> None:
    """Writes the model with these initializers behind its own. Takes them out of the dict as they are written.

    A message of protobuf is its fields one after the other, in any order: what is left out of `model` can follow it.
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
    """What stands before the array's bytes."""
    about = onnx.TensorProto(
        name=name, dims=array.shape, data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    ).SerializeToString()
    inner = about + _head(_BYTES, array.nbytes)
    return _head(_INITIALIZER, len(inner) + array.nbytes) + inner


def _head(field: int, length: int) -> bytes:
    """What stands before a field's content: its number and wire type, and its length."""
    return _varint(field << 3 | _WITH_LENGTH) + _varint(length)


def _varint(number: int) -> bytes:
    """Protobuf's integers: seven bits a byte, the lowest first, the eighth set where more follow."""
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])
