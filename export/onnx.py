"""Bundle -> ONNX, through torch.export: the whole one-step map, from N(0, 1) noise and class ids to uint8 pixels."""

import json
import math
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import onnxscript
import torch
from torch import Tensor, nn

import uni_instruct
from uni_instruct.bundle import DECODER, WEIGHTS, Bundle
from uni_instruct.engines.onnxruntime import CLASS_IDS, DENOISED, IMAGES, NOISE
from uni_instruct.errors import RequestError
from uni_instruct.networks.one_step import OneStep, load_one_step, to_uint8

# The newest that keeps group normalisation in a form that CPU runtimes are fast at.
OPSET = 20
# A protobuf message, and so a file that holds its weights, ends here.
LARGEST_FILE_BYTES = 2**31 - 1
# A smaller tensor is not worth a node.
SMALLEST_HALVED = 1024


class WithPixels(nn.Module):
    """z -> (uint8 pixels [B, H, W, C], the images before rounding [B, C, H, W]): the two outputs of the graph."""

    def __init__(self, generator: OneStep):
        super().__init__()
        self.generator = generator

    def forward(self, noise: Tensor, class_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """noise float32 [B, C, H, W], N(0, 1); class_ids int64 [B], None for an unconditional generator."""
        images = self.generator(noise, class_ids)
        return to_uint8(images), images


def build(bundle: Bundle, path: Path) -> dict[str, str]:
    """Writes the bundle's graph to `path`, weights inline. Returns the versions of the tools.

    Raises RequestError for weights that do not fit into one file.
    """
    size = (bundle.path / WEIGHTS).stat().st_size * (2 if bundle.stored_precision() == "fp16" else 1)
    size += (bundle.path / DECODER).stat().st_size if bundle.spec.decoder else 0
    if size > LARGEST_FILE_BYTES:
        raise RequestError(
            f"{bundle.path} holds {size} bytes of float32 weights, one ONNX file at most {LARGEST_FILE_BYTES}",
            remedy="use the torch engine for it",
        )
    model = _export(WithPixels(load_one_step(bundle)).eval(), bundle)
    _strip(model)
    _store_in_half(model)
    onnx.helper.set_model_props(model, _properties(bundle))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return {tool.__name__: tool.__version__ for tool in (torch, onnx, onnxscript, onnxruntime)}


def _export(module: WithPixels, bundle: Bundle) -> onnx.ModelProto:
    # Two images: a batch of one would be taken for a constant.
    example = [torch.zeros(2, *bundle.spec.noise_shape)]
    names = [NOISE]
    if bundle.spec.num_classes:
        example.append(torch.zeros(2, dtype=torch.int64))
        names.append(CLASS_IDS)
    with warnings.catch_warnings():
        # The exporter warns of its own deprecated calls, and that both inputs share the name of their batch axis.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(example),
            dynamo=True,
            opset_version=OPSET,
            input_names=names,
            output_names=[IMAGES, DENOISED],
            dynamic_shapes=tuple({0: "batch"} for _ in example),
            verbose=False,
        )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _store_in_half(model: onnx.ModelProto) -> None:
    """Stores as float16, with a Cast behind it, each weight that float16 holds exactly: those of a bundle in half precision.

    Runtimes fold the casts when they load the file, so that the graph computes what it did before, from half the bytes.
    """
    graph, casts = model.graph, []
    for tensor in graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or math.prod(tensor.dims) < SMALLEST_HALVED:
            continue
        array = onnx.numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if np.array_equal(half, array):
            stored = f"{tensor.name}.fp16"
            casts.append(onnx.helper.make_node("Cast", [stored], [tensor.name], to=onnx.TensorProto.FLOAT))
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, stored))
    nodes = [*casts, *graph.node]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _strip(model: onnx.ModelProto) -> None:
    """Removes what the exporter notes on every node: stack traces with local paths, and a dump of the torch program."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def _properties(bundle: Bundle) -> dict[str, str]:
    return {
        "uni_instruct.version": uni_instruct.__version__,
        "uni_instruct.spec": json.dumps(asdict(bundle.spec)),
        "uni_instruct.weights_sha256": bundle.weights_sha256,
    }
