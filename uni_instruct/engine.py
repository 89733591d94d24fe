"""Engine: whatever turns noise into images. The caller never learns which runtime it holds."""

import importlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.errors import RequestError
from uni_instruct.spec import ModelSpec


class Engine(Protocol):
    """A generator, ready to run on one device."""

    spec: ModelSpec
    name: str
    device: str

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        """Images of any batch B >= 1, a fresh array.

        noise: float32 [B, C, H, W], N(0, 1); class_ids: int64 [B] in range, None exactly for an unconditional spec.
        Returns uint8 [B, H, W, C].
        """
        ...


# kind -> the class that runs it, imported when asked for; the order is the order of preference.
ENGINES = {
    "onnx": "uni_instruct.engines.onnxruntime:OnnxEngine",
    "torch": "uni_instruct.engines.torch:TorchEngine",
}


def available_engines(bundle: Bundle) -> list[str]:
    """Kinds that this bundle can be opened with, the fastest first. Torch needs no export."""
    return [kind for kind in ENGINES if kind == "torch" or (bundle.engine_folder(kind) / "engine.json").is_file()]


def open_engine(bundle: Bundle | str | Path, kind: str | None = None, *, spin: bool = True) -> Engine:
    """The bundle's engine of that kind; without a kind, the fastest that was exported, else torch.

    spin: whether its threads keep their cores while they wait for each other. That is faster where the engine has the machine
    to itself, slower where others want the cores, as in a server (docs/export.md, "Threads"); torch goes by OMP_WAIT_POLICY.
    Raises RequestError for an unknown kind or one that was not exported, BundleError where a file does not match its hash.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    kind = engine_kind(bundle, kind)
    engine: Engine = engine_class(kind)(bundle) if kind == "torch" else engine_class(kind)(bundle, spin=spin)
    return engine


def engine_kind(bundle: Bundle, kind: str | None = None) -> str:
    """The kind that open_engine would open, without loading it. Raises the same RequestError."""
    present = available_engines(bundle)
    if kind is None:
        return present[0]
    if kind not in ENGINES:
        raise RequestError(f"engine '{kind}' is unknown", remedy=f"choose one of {', '.join(ENGINES)}", param="engine")
    if kind not in present:
        raise RequestError(
            f"bundle {bundle.path} has no {kind} engine",
            remedy=f"uni-instruct export {bundle.path} --to {kind}",
            param="engine",
        )
    return kind


def engine_class(kind: str) -> Any:
    """The class that runs engines of that kind, imported now: `cls(bundle)`; exported kinds also take `folder` and `spin`."""
    module, _, name = ENGINES[kind].partition(":")
    return getattr(importlib.import_module(module), name)
