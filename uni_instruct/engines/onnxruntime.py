"""ONNX Runtime: one file that holds the whole one-step map, from N(0, 1) noise to uint8 pixels. Needs no torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engines.record import verified_file
from uni_instruct.engines.threads import usable_cpus
from uni_instruct.errors import BundleError, MissingExtraError, RequestError
from uni_instruct.spec import ModelSpec

if TYPE_CHECKING:
    import onnxruntime

# The graph's interface: what `export` writes and this engine feeds and reads.
LATENTS, CLASS_IDS = "noise", "class_ids"
IMAGES, DENOISED = "images", "denoised"

# Provider of ONNX Runtime -> the device it runs on.
PROVIDERS = {"CPUExecutionProvider": "cpu"}


class OnnxEngine:
    """Runs the bundle's exported graph in fp32; results do not depend on the batch (measured when it was exported).

    folder: where the engine stands, by default the bundle's own. spin: as in `open_engine`. Raises BundleError where its files
    do not match engine.json or the bundle's weights, RequestError where ONNX Runtime does not use the provider that was asked
    for.
    """

    name = "onnx"

    def __init__(
        self,
        bundle: Bundle,
        *,
        folder: Path | None = None,
        provider: str = "CPUExecutionProvider",
        spin: bool = True,
    ):
        if provider not in PROVIDERS:
            raise RequestError(
                f"provider '{provider}' is unknown", remedy=f"choose one of {', '.join(PROVIDERS)}", param="engine"
            )
        self.spec = bundle.spec
        self.device = PROVIDERS[provider]
        self._session = _session(verified_file(bundle, folder or bundle.engine_folder(self.name)), provider, spin)
        _check_interface(self._session, bundle.spec)

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        """Images uint8 [B, H, W, C] of N(0, 1) noise float32 [B, C, H, W]."""
        return self._run(IMAGES, noise, class_ids)

    def denoised(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        """The images before rounding: float32 [B, C, H, W] in about [-1, 1]."""
        return self._run(DENOISED, noise, class_ids)

    def _run(self, output: str, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        feed = {LATENTS: noise} if class_ids is None else {LATENTS: noise, CLASS_IDS: class_ids}
        result: np.ndarray = self._session.run([output], feed)[0]
        return result


def _session(path: Path, provider: str, spin: bool) -> "onnxruntime.InferenceSession":
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnxruntime", extra="serve") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
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


def _check_interface(session: "onnxruntime.InferenceSession", spec: ModelSpec) -> None:
    expected = {LATENTS, CLASS_IDS} if spec.num_classes else {LATENTS}
    inputs: dict[str, Any] = {port.name: port.shape for port in session.get_inputs()}
    outputs = {port.name for port in session.get_outputs()}
    if set(inputs) != expected or outputs != {IMAGES, DENOISED} or tuple(inputs[LATENTS][1:]) != spec.noise_shape:
        raise BundleError(
            f"the graph maps {inputs} to {sorted(outputs)}, which does not fit generator '{spec.name}'",
            remedy="export the engine again",
        )
