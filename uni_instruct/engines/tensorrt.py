"""The TensorRT and TensorRT-RTX engines: plans for one kind of GPU. One class serves both packages, as their APIs match.

Needs no torch: memory and stream come from NVIDIA's driver (hardware/cuda.py).
"""

import importlib
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.class_mixture import ClassIds
from uni_instruct.engines.graph_ports import DENOISED, IMAGES, NOISE, check_interface
from uni_instruct.engines.hardware.cuda import CudaStream
from uni_instruct.engines.hardware.device import device_index
from uni_instruct.engines.outputs import Outputs
from uni_instruct.engines.record import EngineId, EngineRecord, StoredEngine
from uni_instruct.errors import BundleError, DiskError, MissingExtraError, UniInstructError
from uni_instruct.system.files import atomic_file, cache_folder

if TYPE_CHECKING:
    import types

# Runtime -> its Python package; runtime -> the extra of this package that installs it.
PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "gpu", "tensorrt-rtx": "tensorrt-rtx"}
# Activations begin at multiples of this many bytes. Also the smallest buffer for them, as CUDA allocates none of 0 bytes.
_ALIGNMENT = 256
# TensorRT reports why a call failed only to its logger: the last errors are kept for messages.
_errors: deque[str] = deque(maxlen=8)


class TensorRtEngine:
    """Runs a bundle's plan. Batches are padded to 1, 2, 4, ..., each a CUDA graph; those above the plan's profile are split.

    spin is ignored. Raises BundleError if the engine's files do not match engine.json or the bundle's weights, or if the
    installed TensorRT cannot run the plan on this GPU.
    """

    def __init__(self, bundle: Bundle, stored: StoredEngine, *, device: str, spin: bool = True):
        self.spec, self.id, self.device = bundle.spec, stored.engine_id, device
        trt = load_package(self.id)
        record, file = stored.record(), stored.file()
        check_version(record, trt.__version__)
        self._lock = threading.Lock()
        self._stream = CudaStream(device_index(device))
        try:
            with self._stream.current():
                self._program: _Program | None = _Program(trt, deserialised(trt, file), self._stream, _cache_file(record))
            self._ports = check_interface(self.spec, stored, self._program.inputs, self._program.outputs)
            self.mixes_classes = self._ports.mixes_classes
        except BaseException:
            self._program = None
            self._stream.close()
            raise

    def __call__(self, noise: np.ndarray, class_ids: ClassIds | None) -> np.ndarray:
        """Images uint8 [B, H, W, C] of N(0, 1) noise float32 [B, *noise_shape]."""
        return self._run([IMAGES], noise, class_ids)[0]

    def outputs(self, noise: np.ndarray, class_ids: ClassIds | None) -> Outputs:
        """The pixels, and the images before rounding: float32 [B, C, H, W] in about [-1, 1]."""
        return Outputs(*self._run([IMAGES, DENOISED], noise, class_ids))

    def close(self) -> None:
        """Frees the GPU's memory, as soon as calls in other threads have finished."""
        with self._lock:
            if self._program is not None:
                with self._stream.current():
                    self._program = None
                self._stream.close()

    def _run(self, wanted: Sequence[str], noise: np.ndarray, class_ids: ClassIds | None) -> list[np.ndarray]:
        inputs = self._ports.checked(noise, class_ids)
        # One caller at a time: a second stream with buffers of its own would not make the GPU faster.
        with self._lock:
            assert self._program is not None, "the engine was closed"
            most = min(self._program.most, self.spec.max_decoder_batch or self._program.most)
            with self._stream.current():
                found = [self._program.run(self._ports.feeds(part), wanted) for part in inputs.parts(most)]
        return [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True)]


class _Program:
    """A plan loaded on its GPU, with buffers for its largest batch, and one execution context per batch size used so far."""

    def __init__(self, trt: "types.ModuleType", engine: Any, stream: CudaStream, cache_file: Path | None):
        self._trt, self._engine, self._stream = trt, engine, stream
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        reads = {name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        self.inputs: dict[str, list[int | str]] = {name: ["batch", *shapes[name][1:]] for name in names if name in reads}
        self.outputs = [name for name in names if name not in reads]
        self.most: int = engine.get_tensor_profile_shape(NOISE, 0)[2][0]
        self._hosts, self._addresses = {}, {}
        for name in names:
            row = np.empty(shapes[name][1:], trt.nptype(engine.get_tensor_dtype(name)))
            size = self.most * row.nbytes
            self._hosts[name] = stream.host_buffer(size).view(row.dtype).reshape(self.most, *row.shape)
            self._addresses[name] = stream.device_buffer(size)
        # All contexts share this memory, as only one runs at a time.
        self._activations = stream.device_buffer(max(_ALIGNMENT, engine.device_memory_size_v2))
        self._kernels = _KernelCache(trt, engine, cache_file) if hasattr(trt, "CudaGraphStrategy") else None
        self._calls: dict[int, _Call] = {}

    def run(self, feeds: Mapping[str, np.ndarray], wanted: Sequence[str]) -> list[np.ndarray]:
        """Run a part of at most `most` images; feeds: its arrays by input name. Returns a fresh array per name in `wanted`."""
        count = len(feeds[NOISE])
        size = min(self.most, 1 << (count - 1).bit_length())  # the next power of two
        rows = np.minimum(np.arange(size), count - 1)  # pads by repeating the last row
        for name, values in feeds.items():
            self._hosts[name][:size] = values[rows]
            self._stream.upload(self._addresses[name], self._hosts[name][:size])
        # A new size: making its _Call runs it once, so there is no call of run().
        if size not in self._calls:
            self._calls[size] = _Call(self._context(size), self._stream, captured=self._kernels is None)
            if self._kernels is not None:
                self._stream.synchronize()
                self._kernels.keep()
        else:
            self._calls[size].run()
        for name in wanted:
            self._stream.download(self._hosts[name][:size], self._addresses[name])
        self._stream.synchronize()
        return [self._hosts[name][:count].copy() for name in wanted]

    def _context(self, size: int) -> Any:
        """A new context for that batch size. Each size has its own, as a context in a CUDA graph must not change its shapes."""
        own_memory = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(
            own_memory if self._kernels is None else self._kernels.config(own_memory)
        )
        if context is None:
            raise _failed("TensorRT cannot create an execution context")
        context.set_device_memory(self._activations, max(_ALIGNMENT, self._engine.device_memory_size_v2))
        for name, shape in self.inputs.items():
            if not context.set_input_shape(name, (size, *shape[1:])):
                raise _failed(f"the TensorRT engine does not accept a batch of {size}")
        for name, address in self._addresses.items():
            context.set_tensor_address(name, address)
        return context


class _Call:
    """One batch size's pass through the network. The constructor already runs it once, as TensorRT finishes its set-up then."""

    def __init__(self, context: Any, stream: CudaStream, captured: bool):
        self._context, self._stream, self._graph = context, stream, 0
        self._enqueue()
        if captured:
            stream.synchronize()
            self._graph = stream.capture(self._enqueue)

    def run(self) -> None:
        """Start a run on the stream, without waiting for it."""
        if self._graph:
            self._stream.launch(self._graph)
        else:
            self._enqueue()

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise _failed("the TensorRT engine failed to run")


class _KernelCache:
    """Keeps the kernels that TensorRT-RTX compiles on this machine, in a file for the next process.

    Also has TensorRT-RTX capture CUDA graphs by itself, so that `_Call` need not.
    """

    def __init__(self, trt: "types.ModuleType", engine: Any, file: Path | None):
        self._trt, self._engine, self._file = trt, engine, file
        self._cache = engine.create_runtime_config().create_runtime_cache()
        if file is not None and file.is_file():
            self._cache.deserialize(file.read_bytes())  # if it is another GPU's or version's, it is ignored

    def config(self, memory: Any) -> Any:
        """The configuration for a context whose memory is allocated in that way."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(memory)
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        # Compile kernels for the exact shapes before the first run; by default that happens later, in the background.
        config.dynamic_shapes_kernel_specialization_strategy = self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.set_runtime_cache(self._cache)
        return config

    def keep(self) -> None:
        """Write the kernels compiled so far to the file; do nothing if it cannot be written."""
        if self._file is None:
            return
        try:
            with atomic_file(self._file) as partial:
                partial.write_bytes(self._cache.serialize())
        except (DiskError, OSError):
            self._file = None


def load_package(engine_id: EngineId) -> "types.ModuleType":
    """Import the package that runs the engine. Raises MissingExtraError if it is not installed."""
    package = PACKAGES[engine_id.runtime]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtraError(package, extra=EXTRAS[engine_id.runtime]) from error


def check_version(record: EngineRecord, installed: str) -> None:
    """Raises BundleError if another version of TensorRT built the plan: each version runs only its own plans."""
    package = PACKAGES[record.id.runtime]
    built = record.versions.get(package)
    if built is None:
        raise BundleError(
            f"the record of engine {record.engine_id} lacks the version of {package} that built it",
            remedy="export the engine again",
        )
    if built != installed:
        raise BundleError(
            f"engine {record.engine_id} runs only with {package} {built}, which built it, "
            f"and {package} {installed} is installed",
            remedy=f"export it again, or pip install {package}=={built}",
        )


def deserialised(trt: "types.ModuleType", file: Path) -> Any:
    """Load the file's plan on the current GPU. Raises BundleError with TensorRT's reason if it cannot run here."""
    _errors.clear()
    runtime, plan = trt.Runtime(logger(trt)), file.read_bytes()
    if hasattr(runtime, "get_engine_validity"):  # reads only the plan's header, and says what does not fit
        validity, diagnostics = runtime.get_engine_validity(plan)
        reasons = [name for name, flag in trt.EngineInvalidityDiagnostics.__members__.items() if int(diagnostics) & int(flag)]
        if validity == trt.EngineValidity.INVALID and reasons:
            raise _unfit(trt, file, ", ".join(reason.lower().replace("_", " ") for reason in reasons))
    engine = runtime.deserialize_cuda_engine(plan)  # None if it fails, not an exception
    if engine is None:
        raise _unfit(trt, file, last_error())
    return engine


@cache
def logger(trt: "types.ModuleType") -> Any:
    """The process's only logger for that package, as TensorRT would ignore a second one. It keeps errors for `last_error`."""

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                _errors.append(" ".join(message.split()))

    return Log()


def last_error() -> str:
    """The last error that TensorRT logged."""
    return _errors[-1][:300] if _errors else "TensorRT gives no reason"


def _unfit(trt: "types.ModuleType", file: Path, reason: str) -> BundleError:
    return BundleError(f"{trt.__name__} {trt.__version__} cannot load {file}: {reason}", remedy="export the engine again")


def _failed(what: str) -> UniInstructError:
    return UniInstructError(f"{what}: {last_error()}", remedy="free memory on the GPU, or use another engine")


def _cache_file(record: EngineRecord) -> Path | None:
    try:
        return cache_folder() / "tensorrt-rtx" / f"{record.file_sha256[:16]}.cache"
    except RuntimeError:  # there is no home directory
        return None
