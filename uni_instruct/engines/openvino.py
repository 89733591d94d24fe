"""The OpenVINO engine: the generator's graph on the CPU, in fp32, in bf16, or with convolutions in int8. Needs no torch."""

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.class_mixture import ClassIds
from uni_instruct.engines.graph_ports import DENOISED, IMAGES, check_interface
from uni_instruct.engines.hardware.device import CPU
from uni_instruct.engines.hardware.threads import Threads, usable_cpus
from uni_instruct.engines.openvino_file import read_model
from uni_instruct.engines.outputs import Outputs
from uni_instruct.engines.record import EngineId, StoredEngine
from uni_instruct.errors import BundleError, MissingExtraError, RequestError
from uni_instruct.system.files import cache_folder

if TYPE_CHECKING:
    import openvino

# Precision -> (OpenVINO's precision hint, the capability that the processor must have).
# fp32 needs a hint too: by default OpenVINO computes in bf16 if the processor has it.
# int8 is part of the graph. Its other layers run in bf16 if the processor has it, except those marked; else in fp32.
_HINTS = {"fp32": ("f32", "FP32"), "bf16": ("bf16", "BF16"), "int8": ("f32", "INT8")}
# The most images of one call: with more, the activations between two layers no longer fit into the CPU's cache.
MAX_PART = 16
# With at least this many images per stream, several streams of one thread are faster than one stream of several threads.
MIN_PART = 4


class OpenVinoEngine:
    """Runs a bundle's graph: small batches in one stream of all threads, large ones split among one stream per thread.

    streams: use this number of streams for every batch, each with its share of the threads. spin is ignored: OpenVINO's threads
    sleep after a short wait in any case. Raises BundleError if the engine's files do not match engine.json or the bundle's
    weights, RequestError if this processor does not support the engine's precision.
    """

    def __init__(
        self, bundle: Bundle, stored: StoredEngine, *, device: str = CPU, spin: bool = True, streams: int | None = None
    ):
        assert device == CPU, device
        self.spec, self.id, self.device = bundle.spec, stored.engine_id, device
        self._file, self._threads, self._fixed_streams = stored.file(), usable_cpus(), streams
        self._single_stream: _Streams | None = _Streams(self._file, self.id, streams or 1)
        self._ports = check_interface(self.spec, stored, self._single_stream.inputs, self._single_stream.outputs)
        self.mixes_classes = self._ports.mixes_classes
        self._multi_stream: _Streams | None = None
        self._lock = threading.Lock()

    def __call__(self, noise: np.ndarray, class_ids: ClassIds | None) -> np.ndarray:
        """Images uint8 [B, H, W, C] of N(0, 1) noise float32 [B, *noise_shape]."""
        return self.outputs(noise, class_ids).pixels

    def outputs(self, noise: np.ndarray, class_ids: ClassIds | None) -> Outputs:
        """The pixels, and the images before rounding: float32 [B, C, H, W] in about [-1, 1]."""
        inputs = self._ports.checked(noise, class_ids)
        streams = self._streams_for(len(inputs.noise))
        found = streams.run(map(self._ports.feeds, inputs.parts(self._part_size(len(inputs.noise), streams.count))))
        return found[0] if len(found) == 1 else Outputs(*map(np.concatenate, zip(*found, strict=True)))

    def close(self) -> None:
        """Frees the compiled graphs, as soon as calls in other threads have finished."""
        with self._lock:
            for streams in (self._single_stream, self._multi_stream):
                if streams is not None:
                    streams.close()
            self._single_stream = self._multi_stream = None

    def _streams_for(self, images: int) -> "_Streams":
        with self._lock:
            assert self._single_stream is not None, "the engine was closed"
            if self._fixed_streams or self._threads == 1 or images < MIN_PART * self._threads:
                return self._single_stream
            if self._multi_stream is None:  # compiled on first use: a process that makes one image at a time never needs it
                self._multi_stream = _Streams(self._file, self.id, self._threads)
            return self._multi_stream

    def _part_size(self, images: int, streams: int) -> int:
        """Images per part. The number of parts is a multiple of `streams` if possible, so that no stream is idle."""
        largest = min(MAX_PART, self.spec.max_decoder_batch or MAX_PART)
        rounds = -(-images // (streams * largest))
        return -(-images // (streams * rounds))


# OpenVINO imports NumPy's functions on the first array. If two threads pass the first arrays at once, they deadlock: one holds
# the GIL and waits for the import, which waits for the GIL (openvino 2026.4: a first batch in two streams).
_first_use = threading.Lock()


class _Streams:
    """The graph, compiled for `count` inference requests at a time."""

    def __init__(self, file: Path, engine_id: EngineId, count: int):
        self.count = count
        model = _compiled(file, engine_id, count)
        self.inputs = {port.any_name: _shape(port) for port in model.inputs}
        self.outputs = {port.any_name for port in model.outputs}
        self._idle: SimpleQueue[openvino.InferRequest] = SimpleQueue()
        for _ in range(count):
            self._idle.put(model.create_infer_request())
        self._pool = ThreadPoolExecutor(count, "openvino") if count > 1 else None

    def run(self, parts: Iterable[Mapping[str, np.ndarray]]) -> list[Outputs]:
        """Run each part, its arrays by input name; returns the outputs in the order of the parts."""
        return list((map if self._pool is None else self._pool.map)(self._run_one, parts))

    def close(self) -> None:
        """Wait for running requests."""
        if self._pool is not None:
            self._pool.shutdown()

    def _run_one(self, feeds: Mapping[str, np.ndarray]) -> Outputs:
        request = self._idle.get()
        try:
            result = request.infer(feeds)
            return Outputs(result[IMAGES].copy(), result[DENOISED].copy())  # copies, as the request reuses its memory
        finally:
            self._idle.put(request)


def check_precision(engine_id: EngineId) -> None:
    """Raises RequestError if this processor does not support the engine's precision, MissingExtraError without OpenVINO."""
    core, (_, ability) = _core(), _HINTS[engine_id.precision]
    if ability not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise RequestError(
            f"this processor has no {engine_id.precision} arithmetic, which engine {engine_id} needs",
            remedy=f"use an engine of another precision, such as {engine_id.runtime}-fp32",
            param="engine",
        )


def precision_hint(precision: str) -> str:
    """OpenVINO's hint for the precision in which this processor computes the graph of such an engine."""
    hint, _ = _HINTS[precision]
    # In an int8 engine, bf16 for the other layers costs little accuracy: 8 bits round more.
    return "bf16" if precision == "int8" and "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else hint


def _core() -> "openvino.Core":
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise MissingExtraError("openvino", extra="serve") from error
    return openvino.Core()


def _compiled(file: Path, engine_id: EngineId, streams: int) -> "openvino.CompiledModel":
    check_precision(engine_id)
    hint = precision_hint(engine_id.precision)
    settings = {
        "INFERENCE_PRECISION_HINT": hint,
        **Threads.here(spin=False).for_openvino(streams),
    }
    _import_numpy_first()
    try:
        core = _core()
        model = core.compile_model(read_model(core, file), "CPU", settings | _cache())
    except Exception as error:  # most of OpenVINO's errors are RuntimeErrors, but not all
        problem = " ".join(str(error).split())[:200]
        raise BundleError(f"OpenVINO cannot load {file}: {problem}", remedy="export the engine again") from error
    found = model.get_property("INFERENCE_PRECISION_HINT").to_string()
    if found != hint:
        raise RequestError(
            f"OpenVINO computes in {found} on this processor, and engine {engine_id} needs {hint}",
            remedy="use another engine",
            param="engine",
        )
    return model


def _import_numpy_first() -> None:
    import openvino

    with _first_use:
        openvino.Tensor(np.zeros(1, np.float32)).data.sum()


def _cache() -> dict[str, str]:
    """The setting for a cache of compiled graphs, which makes the next start faster; {} if it cannot be written."""
    try:
        folder = cache_folder() / "openvino"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()  # raises in a folder that exists but is read-only
    except (OSError, RuntimeError):
        return {}
    return {"CACHE_DIR": str(folder)}


def _shape(port: "openvino.ConstOutput") -> list[int | str]:
    return [size.get_length() if size.is_static else "batch" for size in port.partial_shape]
