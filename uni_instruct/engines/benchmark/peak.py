"""The peak FLOPs/s that this machine reaches in practice: in a chain of large 3x3 convolutions, the main work of generators.

torch or OpenVINO runs it, whichever is faster here. An engine's FLOPs/s are then given as a share of this peak.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from uni_instruct.engines.benchmark.measure import median_seconds
from uni_instruct.engines.hardware.device import CPU, device_type
from uni_instruct.engines.hardware.threads import Threads
from uni_instruct.engines.runtime import RUNTIMES

CHANNELS, SIZE, LAYERS = 128, 32, 4
# Images per call. A GPU needs far more than a CPU to be fully used.
PEAK_IMAGES = {"cpu": 8, "cuda": 512}
_TRY_S = 0.2
# Precision -> (OpenVINO's precision hint, the capability that the processor must have). Nodes in the graph quantize to int8.
_OPENVINO = {"fp32": ("f32", "FP32"), "bf16": ("bf16", "BF16"), "int8": ("f32", "INT8")}
_TORCH = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Convolutions:
    """The convolutions to time. flops: per call; a multiply-add counts as 2. by: the runtime and what it computes, in words."""

    precision: str
    device: str
    by: str
    flops: float
    call: Callable[[], object]


def convolutions(precision: str, device: str) -> Convolutions | None:
    """The convolutions by torch or by OpenVINO, whichever is faster. None if neither can run that precision on that device."""
    calls = {name: call for name, make in _MAKERS.items() if (call := make(precision, device)) is not None}
    if not calls:
        return None
    seconds = {name: median_seconds(call, _TRY_S) for name, call in calls.items()}
    fastest = min(seconds, key=lambda name: seconds[name])
    images = PEAK_IMAGES[device_type(device)]
    # Each of the 9 taps of a 3x3 filter is one multiply-add, per pair of input and output channel, pixel, image and layer.
    flops = 2.0 * 9 * CHANNELS**2 * SIZE**2 * images * LAYERS
    what = f"{LAYERS} layers of {CHANNELS} channels, {SIZE}x{SIZE}, {images} images"
    by = f"{RUNTIMES[fastest].version()}: {what}"
    return Convolutions(precision=precision, device=device, by=by, flops=flops, call=calls[fastest])


def _weights() -> np.ndarray:
    # Standard deviation 1 / sqrt(9 CHANNELS): values keep their size from layer to layer. Denormals would be slow.
    rng = np.random.default_rng(0)
    return (rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) / (3 * CHANNELS**0.5)).astype(np.float32)


def _by_torch(precision: str, device: str) -> Callable[[], object] | None:
    if precision not in _TORCH or not RUNTIMES["torch"].is_installed():
        return None
    Threads.here(spin=False).before_torch()
    import torch

    dtype = getattr(torch, _TORCH[precision])
    place = {"device": device, "dtype": dtype}
    images = PEAK_IMAGES[device_type(device)]
    weight = torch.from_numpy(_weights()).to(**place).contiguous(memory_format=torch.channels_last)
    start = torch.randn(images, CHANNELS, SIZE, SIZE).to(**place).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def call() -> None:
        x = start
        for _ in range(LAYERS):
            x = torch.nn.functional.conv2d(x, weight, padding=1)
        if device != CPU:
            torch.cuda.synchronize(device)

    return call


def _by_openvino(precision: str, device: str) -> Callable[[], object] | None:
    if precision not in _OPENVINO or device != CPU or not RUNTIMES["openvino"].is_installed():
        return None
    import openvino
    import openvino.opset13 as ops

    hint, ability = _OPENVINO[precision]
    core = openvino.Core()
    if ability not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return None
    images = PEAK_IMAGES[CPU]
    noise = np.random.default_rng(1).standard_normal((images, CHANNELS, SIZE, SIZE)).astype(np.float32)
    port = x = ops.parameter(noise.shape, np.float32)
    for _ in range(LAYERS):
        weight = ops.constant(_weights())
        if precision == "int8":
            x, weight = _quantized(ops, x, 256), _quantized(ops, weight, 255, limit=0.1)
        x = ops.convolution(x, weight, [1, 1], [1, 1], [1, 1], [1, 1])
    settings = Threads.here(spin=False).for_openvino(streams=1) | {"INFERENCE_PRECISION_HINT": hint}
    compiled = core.compile_model(openvino.Model([x], [port]), "CPU", settings)
    request, tensor = compiled.create_infer_request(), openvino.Tensor(noise)
    request.set_input_tensor(tensor)

    def call() -> None:
        # The request refers to both but does not keep them alive, so this closure must.
        assert compiled
        assert tensor
        request.infer()

    return call


def _quantized(ops: object, x: object, levels: int, limit: float = 4.0) -> object:
    ends = [np.float32(-limit), np.float32(limit)] * 2
    return ops.fake_quantize(x, *ends, levels)  # type: ignore[attr-defined]


_MAKERS = {"openvino": _by_openvino, "torch": _by_torch}
