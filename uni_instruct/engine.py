"""Engine: whatever turns noise into images. The caller never learns which runtime it holds."""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shlex import quote
from typing import Literal, Protocol

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.engines.outputs import Outputs
from uni_instruct.engines.record import PRECISIONS, EngineId, StoredEngine
from uni_instruct.engines.trial import Trial, TrialKey, noted, trial_key, try_engine
from uni_instruct.errors import EngineRefusedError, MissingExtraError, RequestError, UniInstructError
from uni_instruct.spec import ModelSpec

__all__ = ["RUNTIMES", "TORCH", "Engine", "EngineId", "Outputs", "Runtime", "Selection", "Standing"]
__all__ += ["available_engines", "engine_standing", "load_engine", "open_engine", "select_engine"]

# The engine that every bundle has: the weights themselves, as trained.
TORCH = EngineId("torch", "fp32")
# The same with its large convolutions in bf16: tried as exported engines are, and chosen only where it is asked for.
TORCH_BF16 = EngineId("torch", "bf16")
# How many times as fast another engine must be to be preferred to one that stands before it in RUNTIMES: times vary, and torch
# takes seconds to load and gives other last bits in other batches.
WORTHWHILE = 1.25
_log = logging.getLogger(__name__)


class Engine(Protocol):
    """A generator, ready to run on one device. May be called from several threads; what it returns is the caller's own.

    noise: float32 [B, *noise_shape], N(0, 1), of any batch B >= 1; class_ids: int64 [B] in range, None exactly for an
    unconditional spec.
    """

    spec: ModelSpec
    id: EngineId
    device: str

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        """Images, uint8 [B, H, W, C]. Raises RequestError where the spec makes latents, no pictures."""
        ...

    def outputs(self, noise: np.ndarray, class_ids: np.ndarray | None) -> Outputs:
        """The images, and the same before rounding; latents, which have no pixels, as they are."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds. It cannot be called afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What runs engines: the class, 'module:name', imported when an engine is opened, and the package behind it.

    distributions are the names that the package is installed under; extra is that of this package that brings it. The class
    takes `(bundle, stored, spin=...)`, or `(bundle, precision)` where it runs the weights themselves.
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
        except (ImportError, ValueError):  # somebody blocks it: sys.modules holds None, or a finder raises
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


@dataclass(frozen=True)
class Standing:
    """How an engine of a bundle stands on this machine, and why, in words; trial is what it did here, where it was tried.

    state: 'trusted'; 'refused', as its trial found; 'untried'; 'absent' where its package is not installed; 'unknown' where
    this version has no such runtime. note is the file that keeps a refusal: without it the engine is tried again.
    """

    engine_id: EngineId
    state: Literal["trusted", "refused", "untried", "absent", "unknown"]
    reason: str = ""
    trial: Trial | None = None
    note: Path | None = None

    def facts(self) -> dict[str, str | float | None]:
        """The same for JSON."""
        trial = self.trial or Trial()
        return {
            "engine_id": str(self.engine_id),
            "state": self.state,
            "reason": self.reason or None,
            "relative_l2": trial.relative_l2,
            "images_per_s": trial.images_per_s,
        }


@dataclass(frozen=True)
class Selection:
    """The engine that was chosen, and how it and the others that came into question stand."""

    engine_id: EngineId
    standings: tuple[Standing, ...]

    @property
    def refused(self) -> list[Standing]:
        """Those that cannot be trusted on this machine."""
        return [standing for standing in self.standings if standing.state == "refused"]


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
            name="openvino",
            engine_class="uni_instruct.engines.openvino:OpenVinoEngine",
            package="openvino",
            distributions=("openvino",),
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
    """The bundle's engine of that id; of a bare runtime, or without a word, the fastest that can be trusted on this machine.

    spin: whether its threads keep their cores while they wait for each other. That is faster where the engine has the machine
    to itself, slower where others want the cores, as in a server (docs/export.md, "Threads"); torch goes by OMP_WAIT_POLICY.
    Raises as `select_engine` does, and BundleError where a file does not match its hash.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    chosen = select_engine(bundle, engine).engine_id
    return load_engine(bundle, bundle.engines().get(chosen, chosen), spin=spin)


def load_engine(bundle: Bundle, stored: StoredEngine | EngineId, *, spin: bool = True) -> Engine:
    """That engine of the bundle, by its id where it runs the weights themselves, whether or not it can be trusted here."""
    if isinstance(stored, EngineId):
        return RUNTIMES[stored.runtime].load_class()(bundle, stored.precision)
    return RUNTIMES[stored.engine_id.runtime].load_class()(bundle, stored, spin=spin)


def available_engines(bundle: Bundle) -> list[EngineId]:
    """What this bundle is opened with where none is named, in the order of RUNTIMES and precision. Torch needs no export."""
    order = list(RUNTIMES)
    # Latents are floats: no exported engine hands them out.
    exported = bundle.engines() if bundle.spec.makes_pictures else ()
    known = [engine_id for engine_id in (*exported, TORCH) if engine_id.runtime in RUNTIMES]
    return sorted(known, key=lambda engine_id: (order.index(engine_id.runtime), PRECISIONS.index(engine_id.precision)))


def select_engine(bundle: Bundle, wanted: str | EngineId | None = None) -> Selection:
    """The engine that open_engine would open, without loading it, and how the others that fit stand on this machine.

    An exported engine is tried before its first use here (engines/trial.py). Of those that answer as torch does, torch among
    them where it is installed, the fastest is chosen; torch takes the place of those that do not. An engine asked for by its id
    is that one or an error.

    Raises RequestError for an unknown engine or one that was not exported, MissingExtraError without its package,
    EngineRefusedError where none can be trusted here, BundleError where files of the bundle are damaged.
    """
    candidates = _candidates(bundle, wanted)
    if candidates == [TORCH]:
        return Selection(TORCH, (Standing(TORCH, "trusted"),))
    standings = [_stand(bundle, engine_id) for engine_id in candidates if engine_id != TORCH]
    if TORCH in candidates:
        # Where torch alone is left, nothing depends on its speed.
        contested = any(standing.state == "trusted" for standing in standings)
        standings.append(_stand(bundle, TORCH) if contested or not _torch().is_installed() else Standing(TORCH, "trusted"))
    trusted = [standing for standing in standings if standing.state == "trusted"]
    if not trusted:
        raise _refusal(standings)
    selection = Selection(_fastest(trusted).engine_id, tuple(standings))
    for refused in selection.refused:
        told = "engine %s is refused on this machine: %s; %s takes its place"
        _log.warning(told, refused.engine_id, refused.reason, selection.engine_id)
    return selection


def engine_standing(bundle: Bundle, engine_id: EngineId) -> Standing:
    """How that engine of the bundle stands on this machine, by the trial that was noted; nothing is run.

    Raises BundleError where the engine's record is damaged.
    """
    return _standing(bundle, engine_id, noted) if engine_id.runtime in RUNTIMES else Standing(engine_id, "unknown")


def _candidates(bundle: Bundle, wanted: str | EngineId | None) -> list[EngineId]:
    """The engines of the bundle that fit what is wanted; at least one. Raises RequestError where there is none."""
    present = available_engines(bundle)
    if wanted is None:
        return present
    known = f"choose one of {', '.join([*RUNTIMES, *map(str, present), *map(str, _only_asked_for(bundle))])}"
    if str(wanted) in RUNTIMES:
        runtime = str(wanted)
        fitting = [engine_id for engine_id in present if engine_id.runtime == runtime]
    else:
        engine_id = _parse(str(wanted), known)
        runtime, fitting = engine_id.runtime, [engine_id] if engine_id in (*present, *_only_asked_for(bundle)) else []
    if not fitting:
        others = any(engine_id.runtime == runtime for engine_id in present)
        remedy = known if others else f"uni-instruct export {quote(str(bundle.path))} --to {runtime}"
        raise RequestError(f"bundle {bundle.path} has no {wanted} engine", remedy=remedy, param="engine")
    return fitting


def _only_asked_for(bundle: Bundle) -> list[EngineId]:
    """Engines that no export makes and no choice falls on. There must be images to hold them against."""
    return [TORCH_BF16] if bundle.spec.steps == 1 and bundle.spec.makes_pictures else []


def _parse(text: str, known: str) -> EngineId:
    try:
        engine_id = EngineId.parse(text)
    except RequestError as error:
        raise RequestError(f"engine '{text[:60]}' is unknown", remedy=known, param="engine") from error
    if engine_id.runtime not in RUNTIMES:
        raise RequestError(f"engine '{text[:60]}' is unknown", remedy=known, param="engine")
    return engine_id


def _stand(bundle: Bundle, engine_id: EngineId) -> Standing:
    """How the engine stands here, after its trial where it had none."""
    return _standing(bundle, engine_id, lambda key: try_engine(bundle, engine_id, key))


def _standing(bundle: Bundle, engine_id: EngineId, look_up: Callable[[TrialKey], Trial | None]) -> Standing:
    runtime = RUNTIMES[engine_id.runtime]
    if not runtime.is_installed():
        return Standing(engine_id, "absent", f"package '{runtime.package}' is not installed")
    key = trial_key(bundle, engine_id, runtime.version())
    trial = look_up(key)
    if engine_id == TORCH:  # what others are held against: only its speed is of interest
        return Standing(TORCH, "trusted", trial=trial)
    if trial is None:
        return Standing(engine_id, "untried")
    if trial.problem:
        return Standing(engine_id, "refused", trial.problem, trial, key.existing_note())
    return Standing(engine_id, "trusted", "" if key.reference_sha256 else "no reference.npz to hold it against", trial)


def _fastest(standings: list[Standing]) -> Standing:
    """The first that no other outruns by WORTHWHILE."""
    speeds = [(standing.trial.images_per_s if standing.trial else None) or 0.0 for standing in standings]
    return next(s for s, speed in zip(standings, speeds, strict=True) if speed * WORTHWHILE >= max(speeds))


def _refusal(standings: list[Standing]) -> UniInstructError:
    """Why none of them can be used, and what to do about it."""
    refused = [standing for standing in standings if standing.state == "refused"]
    if not refused:
        runtime = RUNTIMES[standings[0].engine_id.runtime]
        return MissingExtraError(runtime.package, extra=runtime.extra)
    problem = "; ".join(f"engine {s.engine_id} is refused on this machine: {s.reason}" for s in refused)
    remedy = f"use --engine {TORCH}" if _torch().is_installed() else f"pip install 'uni-instruct[{_torch().extra}]' for torch"
    if notes := " and ".join(str(standing.note) for standing in refused if standing.note):
        remedy = f"{remedy}, or delete {notes} to have it tried again"
    return EngineRefusedError(problem, remedy=remedy, param="engine")


def _torch() -> Runtime:
    return RUNTIMES[TORCH.runtime]
