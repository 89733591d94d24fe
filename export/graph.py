"""Write a bundle's ONNX graph, by torch.export: the whole map from N(0, 1) noise and class ids to uint8 pixels."""

import gc
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import onnxscript
import torch
from torch import Tensor, nn

import uni_instruct
from uni_instruct.bundle import DECODER, WEIGHTS, Bundle
from uni_instruct.engines.graph_ports import CLASS_IDS, DENOISED, IMAGES, NOISE, OTHER_IDS, SHARE
from uni_instruct.errors import RequestError
from uni_instruct.export.canonical import FACTORS, CanonicalOneStep
from uni_instruct.export.canonical_blocks import NormFactory
from uni_instruct.export.onnx_file import write_model
from uni_instruct.networks.denoiser import MixedClasses
from uni_instruct.networks.one_step import load_one_step, to_uint8
from uni_instruct.system.processes import release_freed_memory

# The newest opset that keeps group normalisation in a form for which CPU runtimes have fast kernels.
OPSET = 20
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# The largest protobuf message, and so the largest ONNX file that contains its weights.
MAX_FILE_BYTES = 2**31 - 1
# Smaller tensors stay in the graph's message, and are not stored as float16: it would save too little for a Cast node each.
MIN_FLOAT16_SIZE = 1024


class WithPixels(nn.Module):
    """Adds the conversion to pixels: z -> (uint8 pixels [B, H, W, C], images before rounding float32 [B, C, H, W]).

    cast_last: transpose first and convert to uint8 last, as TensorRT needs it. By default the uint8 values are transposed.
    """

    def __init__(self, generator: nn.Module, cast_last: bool = False):
        super().__init__()
        self.generator, self.cast_last = generator, cast_last

    def forward(
        self, noise: Tensor, class_ids: Tensor | None = None, other_ids: Tensor | None = None, share: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both outputs. noise: float32 [B, *noise_shape], N(0, 1). Classes: as in `ClassMixture`; None without classes."""
        if class_ids is None or other_ids is None or share is None:
            images = self.generator(noise, class_ids)
        else:
            images = self.generator(noise, MixedClasses(class_ids, other_ids, share))
        if self.cast_last:
            # `to_uint8` in another order: floats are transposed, not bytes.
            return (images * 127.5 + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8), images
        return to_uint8(images), images


def write_graph(
    bundle: Bundle,
    path: Path,
    norm: NormFactory,
    *,
    weights: str = "exact",
    precision: str = "fp32",
    opset: int = OPSET,
    cast_last: bool = False,
    optional_mixture: bool = False,
) -> dict[str, str]:
    """Write the bundle's graph to `path`, with its weights in the same file. Returns the versions of the tools.

    norm: converts group normalisation to the form for which the runtime is fast. weights: which are stored as float16: those
    that float16 holds exactly ('exact'), all, rounded if need be ('rounded', for engines that round to 16 bits anyway), or none
    ('wide'). precision: the type that the network computes in, according to the graph. cast_last: as in `WithPixels`.
    optional_mixture: give the inputs for mixtures a default, so that a caller may feed noise and class ids only.
    Raises RequestError if the weights do not fit into one file.
    """
    # The bound is on float32 weights, as the exporter makes them: a file in half precision counts twice.
    size = (bundle.path / WEIGHTS).stat().st_size * (2 if bundle.stored_precision() == "fp16" else 1)
    size += (bundle.path / DECODER).stat().st_size if bundle.spec.decoder else 0
    if size > MAX_FILE_BYTES:
        raise RequestError(
            f"{bundle.path} has {size} bytes of float32 weights, and one ONNX file can hold at most {MAX_FILE_BYTES}",
            remedy="use --engine torch-fp32, which needs no export",
        )
    model, arrays = _export(bundle, norm, DTYPES[precision], opset, cast_last)
    gc.collect()  # objects of the exporter that refer to each other
    _strip(model)
    if weights != "wide":
        _store_in_half(model, arrays, round_weights=weights == "rounded")
    if optional_mixture and bundle.spec.num_classes:
        _give_defaults(model)
    onnx.helper.set_model_props(model, _properties(bundle))
    _check(model, arrays)
    write_model(model, arrays, path)
    return {tool.__name__: tool.__version__ for tool in (torch, onnx, onnxscript)}


def _export(
    bundle: Bundle, norm: NormFactory, dtype: torch.dtype, opset: int, cast_last: bool
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The graph without its large weights, and these weights by name. They share torch's memory, to avoid a second copy."""
    generator = CanonicalOneStep(load_one_step(bundle), norm).in_precision(dtype)
    release_freed_memory()  # what folding took
    # Example inputs of two images: the exporter would take a batch size of 1 for a constant.
    example = [torch.zeros(2, *bundle.spec.noise_shape)]
    names = [NOISE]
    if bundle.spec.num_classes:
        example += [torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(2)]
        names += [CLASS_IDS, OTHER_IDS, SHARE]
    with warnings.catch_warnings():
        # The exporter warns of deprecated calls within itself, and that all inputs have the same name for the batch axis.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            WithPixels(generator, cast_last).eval(),
            tuple(example),
            dynamo=True,
            opset_version=opset,
            input_names=names,
            output_names=[IMAGES, DENOISED],
            dynamic_shapes=tuple({0: "batch"} for _ in example),
            verbose=False,
        )
    assert program is not None
    arrays = _take_weights(program)
    return program.model_proto, arrays


def _give_defaults(model: onnx.ModelProto) -> None:
    """Make the inputs for mixtures optional. In ONNX an input has a default if an initializer has the same name.

    The default is one zero for the whole batch. So these inputs, and all that is computed from them alone, get another name for
    their first dimension: a runtime that took it for the batch size would let tensors of different sizes share memory.
    """
    graph, alone, batched = model.graph, {OTHER_IDS, SHARE}, {NOISE, CLASS_IDS}
    for node in graph.node:
        if batched & set(node.input):
            batched |= set(node.output)
        elif alone & set(node.input):
            alone |= set(node.output)
    for tensor in (*graph.input, *graph.value_info):
        if tensor.name in alone:
            tensor.type.tensor_type.shape.dim[0].dim_param = "mixed"
    for port in graph.input:
        if port.name in (OTHER_IDS, SHARE):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(port.type.tensor_type.elem_type)
            graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, dtype), port.name))


def _take_weights(program: torch.onnx.ONNXProgram) -> dict[str, np.ndarray]:
    """Remove the large weights from the graph, and return them by name."""
    graph, found = program.model.graph, dict[str, np.ndarray]()
    for name, value in list(graph.initializers.items()):
        if value.const_value is not None and value.const_value.size >= MIN_FLOAT16_SIZE:
            found[name] = value.const_value.numpy()
            del graph.initializers[name]
            value.const_value = None  # the exporter keeps a reference to the graph after the export
    return found


def _check(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> None:
    """Raises what onnx raises if types or shapes do not fit. Large weights count as inputs here, as onnx would copy them."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for name, array in weights.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        whole.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, list(array.shape)))
    onnx.checker.check_model(whole, full_check=True)


def _store_in_half(model: onnx.ModelProto, weights: dict[str, np.ndarray], round_weights: bool) -> None:
    """Store weights as float16, each with a Cast to float32 behind it: of a bundle in half precision, these are all large ones.

    Only weights that float16 holds exactly are stored so, also if folding has multiplied them by one of FACTORS: then a Mul
    follows the Cast. With round_weights, all weights are stored as the nearest float16. Runtimes compute Cast and Mul once,
    when they load the file. So the graph computes the same from a file of half the size.
    """
    graph, nodes = model.graph, []
    for name in [name for name, array in weights.items() if array.dtype == np.float32]:
        half, factor = (weights[name].astype(np.float16), 1.0) if round_weights else _as_half(weights[name])
        if half is None:
            continue
        del weights[name]
        weights[f"{name}.fp16"] = half
        wide = name if factor == 1 else f"{name}.wide"
        nodes.append(onnx.helper.make_node("Cast", [f"{name}.fp16"], [wide], to=onnx.TensorProto.FLOAT))
        if factor != 1:
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), f"{name}.factor"))
            nodes.append(onnx.helper.make_node("Mul", [wide, f"{name}.factor"], [name]))
    nodes += graph.node
    graph.ClearField("node")
    graph.node.extend(nodes)


def _as_half(array: np.ndarray) -> tuple[np.ndarray | None, float]:
    """(half, factor) such that array = factor * half within one bit of float32; (None, 1) if there is no such float16 array."""
    for factor in FACTORS:
        with np.errstate(over="ignore", invalid="ignore"):
            half = (array.astype(np.float64) / factor).astype(np.float16)
            if np.allclose(half.astype(np.float64) * factor, array, rtol=2**-23, atol=0):
                return half, factor
    return None, 1.0


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's notes on every node: stack traces with paths of this machine, and a dump of the torch program."""
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
