"""The ONNX Runtime engine: runs one file that maps N(0, 1) noise to uint8 pixels. Needs no torch."""

import importlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.class_mixture import ClassIds
from uni_instruct.engines.graph_ports import DENOISED, IMAGES, check_interface
from uni_instruct.engines.hardware.device import CPU, CUDA, device_index, device_type
from uni_instruct.engines.hardware.threads import Threads
from uni_instruct.engines.outputs import Outputs
from uni_instruct.engines.record import StoredEngine
from uni_instruct.errors import BundleError, MissingExtraError, RequestError
from uni_instruct.noise import Inputs
from uni_instruct.system.files import cache_folder

if TYPE_CHECKING:
    import types

    import onnxruntime

CUDA_PROVIDER, TENSORRT, TENSORRT_RTX = "CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
# Execution provider -> the kind of device it runs on. The default for a device is the first of its kind that is installed.
# TENSORRT_RTX is a plugin: a separate package beside ONNX Runtime's CPU build.
PROVIDERS = {"CPUExecutionProvider": CPU, CUDA_PROVIDER: CUDA, TENSORRT: CUDA, TENSORRT_RTX: CUDA}
RTX_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
# On a GPU batches are padded to 1, 2, 4 and so on up to this, with one CUDA graph per size. Larger batches are split.
MAX_BATCH_SIZE = 64


class OnnxEngine:
    """Runs a bundle's exported graph. On the CPU an image does not depend on its batch (checked at export: batch_invariant).

    provider: the execution provider, one of PROVIDERS that runs on the device. spin: as in `open_engine`. Raises BundleError if
    the engine's files do not match engine.json or the bundle's weights, RequestError if ONNX Runtime cannot use the device or
    the provider.
    """

    def __init__(
        self, bundle: Bundle, stored: StoredEngine, *, device: str = CPU, provider: str | None = None, spin: bool = True
    ):
        self.spec, self.id, self.device = bundle.spec, stored.engine_id, device
        runtime = _package()
        provider = _checked_provider(runtime, device, provider)
        session = _session(runtime, stored.file(), provider, device_index(device), Threads.here(spin))
        self._session: onnxruntime.InferenceSession | None = session
        inputs: dict[str, list[int | str]] = {port.name: port.shape for port in _inputs_of(session)}
        self._ports = check_interface(bundle.spec, stored, inputs, {port.name for port in session.get_outputs()})
        self.mixes_classes = self._ports.mixes_classes
        self._batches = None if device_type(device) == CPU else BoundBatches(session, device, MAX_BATCH_SIZE)

    def __call__(self, noise: np.ndarray, class_ids: ClassIds | None) -> np.ndarray:
        """Images uint8 [B, H, W, C] of N(0, 1) noise float32 [B, *noise_shape]."""
        (pixels,) = self._run([IMAGES], noise, class_ids)
        return pixels

    def outputs(self, noise: np.ndarray, class_ids: ClassIds | None) -> Outputs:
        """The pixels, and the images before rounding: float32 [B, C, H, W] in about [-1, 1]."""
        return Outputs(*self._run([IMAGES, DENOISED], noise, class_ids))

    def close(self) -> None:
        """Frees the session, as soon as calls in other threads have finished."""
        self._session = self._batches = None

    def _run(self, outputs: list[str], noise: np.ndarray, class_ids: ClassIds | None) -> list[np.ndarray]:
        session, batches = self._session, self._batches
        assert session is not None, "the engine was closed"
        inputs = self._ports.checked(noise, class_ids)
        # With a decoder, max_decoder_batch limits the memory that the activations of large pictures take.
        most = (
            self.spec.max_decoder_batch if batches is None else min(batches.most, self.spec.max_decoder_batch or batches.most)
        )
        results: list[list[np.ndarray]] = []
        for part in inputs.parts(most):
            feeds = self._ports.feeds(part, only_needed=batches is None)
            results.append(session.run(outputs, feeds) if batches is None else batches.run(part, feeds, outputs))
        return results[0] if len(results) == 1 else [np.concatenate(parts) for parts in zip(*results, strict=True)]


class BoundBatches:
    """Runs a session with its inputs and outputs at fixed addresses on the device and fixed batch sizes, as CUDA graphs need.

    A batch is padded to the next power of two, `most` at most. Safe to call from several threads; they run one at a time.
    """

    def __init__(self, session: "onnxruntime.InferenceSession", device: str, most: int):
        self.most, self._session, self._lock = most, session, threading.Lock()
        self._place = (device_type(device), device_index(device))
        self._bound: dict[int, _Bound] = {}

    def run(self, part: Inputs, feeds: dict[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        """Run a part of at most `most` images; feeds: its arrays by input name. Returns a fresh array per name in `outputs`."""
        count = len(part.noise)
        size = min(self.most, 1 << (count - 1).bit_length())  # the next power of two
        rows = np.minimum(np.arange(size), count - 1)  # pads by repeating the last row
        with self._lock:
            if size not in self._bound:
                self._bound[size] = _Bound(self._session, size, self._place)
            return [found[:count].copy() for found in self._bound[size].run({n: v[rows] for n, v in feeds.items()}, outputs)]


class _Bound:
    """Device memory for one batch size, bound to inputs and outputs. Its CUDA graph in ONNX Runtime has the size as its id."""

    def __init__(self, session: "onnxruntime.InferenceSession", size: int, place: tuple[str, int]):
        runtime = _package()
        self._session, self._binding, self._options = session, session.io_binding(), runtime.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(size))

        def memory(port: "onnxruntime.NodeArg") -> "onnxruntime.OrtValue":
            return runtime.OrtValue.ortvalue_from_shape_and_type([size, *port.shape[1:]], _DTYPES[port.type], *place)

        self._inputs = {port.name: memory(port) for port in _inputs_of(session)}
        self._outputs = {port.name: memory(port) for port in session.get_outputs()}
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self, feeds: dict[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        for name, array in feeds.items():
            self._inputs[name].update_inplace(array)
        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        return [self._outputs[name].numpy() for name in outputs]


def _inputs_of(session: "onnxruntime.InferenceSession") -> "list[onnxruntime.NodeArg]":
    """All of a graph's inputs. ONNX Runtime lists those with a default separately, as overridable initializers."""
    return [*session.get_inputs(), *session.get_overridable_initializers()]


# ONNX Runtime's name of a port's type -> NumPy's dtype.
_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}


def _package() -> "types.ModuleType":
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", extra="serve") from error


def _checked_provider(runtime: "types.ModuleType", device: str, wanted: str | None) -> str:
    fitting = [name for name, kind in PROVIDERS.items() if kind == device_type(device)]
    if wanted is None:
        there = [name for name in fitting if name in runtime.get_available_providers()]
        return there[0] if there else fitting[-1]
    if wanted not in fitting:
        raise RequestError(
            f"no provider '{wanted}' runs on {device}", remedy=f"choose one of {', '.join(fitting)}", param="engine"
        )
    return wanted


def _session(
    runtime: "types.ModuleType",
    path: Path,
    provider: str,
    index: int,
    threads: Threads,
) -> "onnxruntime.InferenceSession":
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads.count
    options.inter_op_num_threads = 1  # layers run one after the other, each on all threads
    for key, value in threads.for_onnxruntime().items():
        options.add_session_config_entry(key, value)
    options.log_severity_level = 3  # errors only: it would warn of every input that has a default
    providers = None  # a plugin provider is added to the options instead
    if provider == TENSORRT_RTX:
        _add_plugin(runtime, options, index)
    else:
        providers = [(provider, _provider_options(provider, index))]
    try:
        session = runtime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors have no narrower common class
        problem = " ".join(str(error).split())[:200]
        raise BundleError(f"ONNX Runtime cannot load {path}: {problem}", remedy="export the engine again") from error
    # If a provider cannot be used, ONNX Runtime falls back to the CPU without an error.
    if session.get_providers()[0] != provider:
        raise RequestError(
            f"ONNX Runtime could not load {provider}, and fell back to {session.get_providers()[0]}",
            remedy="install the onnxruntime package with that provider, and the GPU libraries that it needs",
            param="engine",
        )
    return session


def _provider_options(provider: str, index: int) -> dict[str, str]:
    """Options that turn CUDA graphs on and TF32 off; for TensorRT, fp16 and a cache of its plans."""
    if provider == CUDA_PROVIDER:
        return {"device_id": str(index), "enable_cuda_graph": "1", "use_tf32": "0"}
    if provider != TENSORRT:
        return {}
    settings = {"device_id": str(index), "trt_cuda_graph_enable": "1", "trt_fp16_enable": "1"}
    try:
        folder = cache_folder() / "onnxruntime-tensorrt"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # without a cache, TensorRT builds its plans at each start, which takes minutes
        return settings
    return settings | {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder)}


def _add_plugin(runtime: "types.ModuleType", options: "onnxruntime.SessionOptions", index: int) -> None:
    """Add the TensorRT-RTX provider, a library of its own, to the session's options. index: the GPU's number."""
    try:
        plugin = importlib.import_module(RTX_PLUGIN)
    except ModuleNotFoundError as error:
        raise MissingExtraError(RTX_PLUGIN, extra="tensorrt-rtx") from error
    name = plugin.get_ep_name()
    if not any(device.ep_name == name for device in runtime.get_ep_devices()):
        runtime.register_execution_provider_library(name, plugin.get_library_path())
    devices = [device for device in runtime.get_ep_devices() if device.ep_name == name]
    if index >= len(devices):
        raise RequestError(
            f"{TENSORRT_RTX} supports {len(devices) or 'none'} of this machine's GPUs, and cuda:{index} was asked for",
            remedy="use another engine, or an RTX GPU of compute capability 8.0 or higher",
            param="device",
        )
    options.add_provider_for_devices([devices[index]], {})
