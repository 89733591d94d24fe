"""Engine: whatever turns noise into images. The caller never learns which runtime it holds."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engines.outputs import Outputs
from uni_instruct.engines.record import EngineId, StoredEngine
from uni_instruct.errors import RequestError
from uni_instruct.spec import ModelSpec

__all__ = ["RUNTIMES", "TORCH", "Engine", "EngineId", "Outputs", "Runtime", "available_engines", "open_engine", "select_engine"]

# The engine that every bundle has: the weights themselves, as trained.
TORCH = EngineId("torch", "fp32")


class Engine(Protocol):
    """A generator, ready to run on one device. May be called from several threads; what it returns is the caller's own.

    noise: float32 [B, *noise_shape], N(0, 1), of any batch B >= 1; class_ids: int64 [B] in range, None exactly for an
    unconditional spec.
    """

    spec: ModelSpec
    id: EngineId
    device: str

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        """Images, uint8 [B, H, W, C]."""
        ...

    def outputs(self, noise: np.ndarray, class_ids: np.ndarray | None) -> Outputs:
        """The images, and the same before rounding."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds. It cannot be called afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What runs engines: the class, 'module:name', imported when an engine is opened, and the package behind it.

    distributions are the names that the package is installed under; extra is that of this package that brings it. The class
    takes `(bundle, stored, spin=...)`, or `(bundle)` where it runs the weights themselves.
    """

    name: str
    engine_class: str
    package: str
    distributions: tuple[str, ...]
    extra: str

    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        try:
            return importlib.util.find_spec(self.package) is not None
        except ValueError:  # blocked: sys.modules holds None
            return False

    def version(self) -> str:
        """Its name and version, 'onnxruntime 1.32.0'."""
        for distribution in self.distributions:
            try:
                return f"{distribution} {version(distribution)}"
            except PackageNotFoundError:
                continue
        return self.package

    def load_class(self) -> Callable[..., Engine]:
        """The class, imported now."""
        module, _, name = self.engine_class.partition(":")
        found: Callable[..., Engine] = getattr(importlib.import_module(module), name)
        return found


# The one table of runtimes; the order is the order of preference where nothing else decides.
RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            name="onnx",
            engine_class="uni_instruct.engines.onnxruntime:OnnxEngine",
            package="onnxruntime",
            distributions=("onnxruntime", "onnxruntime-gpu"),
            extra="serve",
        ),
        Runtime(
            name="torch",
            engine_class="uni_instruct.engines.torch:TorchEngine",
            package="torch",
            distributions=("torch",),
            extra="train",
        ),
    )
}


def open_engine(bundle: Bundle | str | Path, engine: str | EngineId | None = None, *, spin: bool = True) -> Engine:
    """The bundle's engine of that id; of a bare runtime, or without a word, the fastest.

    spin: whether its threads keep their cores while they wait for each other. That is faster where the engine has the machine
    to itself, slower where others want the cores, as in a server (docs/export.md, "Threads"); torch goes by OMP_WAIT_POLICY.
    Raises RequestError for an unknown engine or one that was not exported, BundleError where a file does not match its hash.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    engine_id = select_engine(bundle, engine)
    return load_engine(bundle, bundle.engines().get(engine_id), spin=spin)


def load_engine(bundle: Bundle, stored: StoredEngine | None, *, spin: bool = True) -> Engine:
    """That engine of the bundle, None for torch, whether or not it can be trusted here."""
    if stored is None:
        return RUNTIMES[TORCH.runtime].load_class()(bundle)
    return RUNTIMES[stored.engine_id.runtime].load_class()(bundle, stored, spin=spin)


def available_engines(bundle: Bundle) -> list[EngineId]:
    """What this bundle can be opened with, in the order of RUNTIMES. Torch needs no export."""
    order = list(RUNTIMES)
    known = [engine_id for engine_id in (*bundle.engines(), TORCH) if engine_id.runtime in RUNTIMES]
    return sorted(known, key=lambda engine_id: order.index(engine_id.runtime))


def select_engine(bundle: Bundle, wanted: str | EngineId | None = None) -> EngineId:
    """The engine that open_engine would open, without loading it. Raises the same errors."""
    return _candidates(bundle, wanted)[0]


def _candidates(bundle: Bundle, wanted: str | EngineId | None) -> list[EngineId]:
    """The engines of the bundle that fit what is wanted; at least one. Raises RequestError where there is none."""
    present = available_engines(bundle)
    if wanted is None:
        return present
    known = f"choose one of {', '.join([*RUNTIMES, *map(str, present)])}"
    if str(wanted) in RUNTIMES:
        runtime = str(wanted)
        fitting = [engine_id for engine_id in present if engine_id.runtime == runtime]
    else:
        engine_id = _parse(str(wanted), known)
        runtime, fitting = engine_id.runtime, [engine_id] if engine_id in present else []
    if not fitting:
        others = any(engine_id.runtime == runtime for engine_id in present)
        remedy = known if others else f"uni-instruct export {bundle.path} --to {runtime}"
        raise RequestError(f"bundle {bundle.path} has no {wanted} engine", remedy=remedy, param="engine")
    return fitting


def _parse(text: str, known: str) -> EngineId:
    try:
        engine_id = EngineId.parse(text)
    except RequestError as error:
        raise RequestError(f"engine '{text[:60]}' is unknown", remedy=known, param="engine") from error
    if engine_id.runtime not in RUNTIMES:
        raise RequestError(f"engine '{text[:60]}' is unknown", remedy=known, param="engine")
    return engine_id
