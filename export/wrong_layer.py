"""Find the first layer whose output is wrong: compare an engine's convolutions with the folded module's, for one image."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from uni_instruct.bundle import Bundle
from uni_instruct.engines.graph_ports import OTHER_IDS, SHARE, graph_feeds
from uni_instruct.engines.outputs import relative_l2
from uni_instruct.export.canonical import CanonicalOneStep
from uni_instruct.networks.one_step import as_tensors, load_one_step
from uni_instruct.noise import Inputs


def first_wrong_layer(bundle: Bundle, file: Path, precision: str, inputs: Inputs, limit: float) -> str | None:
    """The first convolution whose output differs by more than `limit` (relative L2), as text: its name and the distance.

    inputs: of one image. OpenVINO runs the file, whatever the engine's runtime, as it can return the output of every layer.
    None if no convolution differs, or if OpenVINO cannot run the file.
    """
    try:
        found = _of_engine(file, precision, inputs)
    except Exception:  # the engine has already failed: this only adds detail to the error
        return None
    truth = _of_module(bundle, inputs)
    for name, expected in truth.items():
        if name in found and not (distance := relative_l2(found[name], expected)) <= limit:  # `not <=`, as NaN is wrong too
            return f"{name.removesuffix('.weight')} (relative L2 {distance:.1e})"
    return None


def _of_engine(file: Path, precision: str, inputs: Inputs) -> dict[str, np.ndarray]:
    """The output of each convolution, before its bias, by the name of its weights."""
    import openvino

    from uni_instruct.engines.openvino import precision_hint
    from uni_instruct.engines.openvino_file import read_model, weight_name

    core = openvino.Core()
    model = core.read_model(_without_defaults(file)) if file.suffix == ".onnx" else read_model(core, file)
    layers = [layer for layer in model.get_ordered_ops() if layer.get_type_name() == "Convolution"]
    names = [weight_name(layer).partition("generator.")[2] for layer in layers]
    first = len(model.outputs)  # the added outputs follow the graph's own
    model.add_outputs([layer.output(0) for layer in layers])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision_hint(precision)})
    result = compiled(graph_feeds(inputs))
    return {name: result[first + i] for i, name in enumerate(names) if name}


def _without_defaults(file: Path) -> bytes:
    """The ONNX graph without defaults for its inputs, as OpenVINO takes an input with a default for a constant."""
    model = onnx.load(file)
    kept = [initializer for initializer in model.graph.initializer if initializer.name not in (OTHER_IDS, SHARE)]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(kept)
    return bytes(model.SerializeToString())


def _of_module(bundle: Bundle, inputs: Inputs) -> dict[str, np.ndarray]:
    module = CanonicalOneStep(load_one_step(bundle))
    recorder = _Recorder({id(parameter): name for name, parameter in module.named_parameters()})
    with torch.no_grad(), recorder:
        module(*as_tensors(inputs, "cpu"))
    return recorder.found


class _Recorder(TorchFunctionMode):
    """Records the output of each convolution, before its bias, by the name of its weights."""

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names, self.found = names, dict[str, np.ndarray]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.conv2d and id(args[1]) in self.names:
            bias = args[2] if len(args) > 2 else None
            bare = result - bias[:, None, None] if isinstance(bias, Tensor) else result
            self.found[self.names[id(args[1])]] = bare.numpy()
        return result
