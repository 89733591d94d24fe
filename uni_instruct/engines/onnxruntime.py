"""ONNX Runtime: one file that holds the whole one-step map, from N(0, 1) noise to uint8 pixels. Needs no torch."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engines.device import CPU, CUDA, kind_of
from uni_instruct.engines.graph import CLASS_IDS, DENOISED, IMAGES, check_interface
from uni_instruct.engines.outputs import Outputs
from uni_instruct.engines.record import StoredEngine
from uni_instruct.engines.threads import Threads
from uni_instruct.errors import BundleError, MissingExtraError, RequestError
from uni_instruct.noise import checked_inputs

if TYPE_CHECKING:
    import onnxruntime

# Provider of ONNX Runtime -> the kind of device it runs on; the first of a kind is taken where none is asked for.
PROVIDERS = {"CPUExecutionProvider": CPU, "CUDAExecutionProvider": CUDA}


class OnnxEngine:
    """Runs a bundle's exported graph in fp32; results do not depend on the batch (measured when it was exported).

    spin: as in `open_engine`. Raises BundleError where the engine's files do not match engine.json or the bundle's weights,
    RequestError where ONNX Runtime does not use the provider that was asked for.
    """

    def __init__(
        self, bundle: Bundle, stored: StoredEngine, *, device: str = CPU, provider: str | None = None, spin: bool = True
    ):
        self.spec, self.id, self.device = bundle.spec, stored.engine_id, device
        fitting = [name for name, kind in PROVIDERS.items() if kind == kind_of(device)]
        provider = provider or fitting[0]
        if provider not in fitting:
            raise RequestError(
                f"no provider '{provider}' runs on {device}", remedy=f"choose one of {', '.join(fitting)}", param="engine"
            )
        self._session: onnxruntime.InferenceSession | None = _session(stored.file(), provider, Threads.here(spin))
        inputs: dict[str, list[int | str]] = {port.name: port.shape for port in self._session.get_inputs()}
        self._noise = check_interface(bundle.spec, inputs, {port.name for port in self._session.get_outputs()})

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        """Images uint8 [B, H, W, C] of N(0, 1) noise float32 [B, C, H, W]."""
        (pixels,) = self._run([IMAGES], noise, class_ids)
        return pixels

    def outputs(self, noise: np.ndarray, class_ids: np.ndarray | None) -> Outputs:
        """The images, and before rounding: float32 [B, C, H, W] in about [-1, 1]."""
        return Outputs(*self._run([IMAGES, DENOISED], noise, class_ids))

    def close(self) -> None:
        """Frees the session, once what runs in other threads is done."""
        self._session = None

    def _run(self, outputs: list[str], noise: np.ndarray, class_ids: np.ndarray | None) -> list[np.ndarray]:
        session = self._session
        assert session is not None, "the engine was closed"
        results: list[list[np.ndarray]] = []
        # A decoder makes large pictures a few at a time, or their activations would fill the memory.
        for z, labels in checked_inputs(self.spec, noise, class_ids).parts(self.spec.images_at_once):
            results.append(session.run(outputs, {self._noise: z} if labels is None else {self._noise: z, CLASS_IDS: labels}))
        return results[0] if len(results) == 1 else [np.concatenate(parts) for parts in zip(*results, strict=True)]


def _session(path: Path, provider: str, threads: Threads) -> "onnxruntime.InferenceSession":
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", extra="serve") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads.count
    options.inter_op_num_threads = 1
    for key, value in threads.for_onnxruntime().items():
        options.add_session_config_entry(key, value)
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # its errors share no class but this one
        problem = " ".join(str(error).split())[:200]
        raise BundleError(f"ONNX Runtime cannot load {path}: {problem}", remedy="export the engine again") from error
    # ONNX Runtime falls back to the CPU without an error.
    if session.get_providers()[0] != provider:
        raise RequestError(
            f"ONNX Runtime uses {session.get_providers()[0]}, not {provider}",
            remedy="install the onnxruntime build that has it, and its libraries",
            param="engine",
        )
    return session
