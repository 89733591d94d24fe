"""Select and open an engine: the object that turns noise into images. All runtimes have the same interface."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal, TypedDict

from uni_instruct.bundle import Bundle
from uni_instruct.engines.compiled.cache import ensure_compiled
from uni_instruct.engines.hardware.device import checked_device, device_type
from uni_instruct.engines.hardware.threads import Threads
from uni_instruct.engines.outputs import Outputs
from uni_instruct.engines.record import COMPILED, PRECISIONS, EngineId, StoredEngine
from uni_instruct.engines.runtime import RUNTIMES, Engine, Runtime
from uni_instruct.engines.trials.trial import Trial, TrialKey, record_speed, recorded_trial, trial_key, try_engine
from uni_instruct.errors import CompilationError, EngineRefusedError, RequestError, UniInstructError
from uni_instruct.system.progress import Progress

__all__ = ["RUNTIMES", "TORCH", "Engine", "EngineId", "EngineStatus", "Outputs", "Runtime", "Selection"]
__all__ += ["available_engines", "engine_status", "load_engine", "open_engine", "select_engine"]

# Every bundle has this engine: torch runs the weights as trained, so it needs no export.
TORCH = EngineId("torch", "fp32")
# The same with its large convolutions in bf16. It is tried like an exported engine, but used only if it is asked for by name.
TORCH_BF16 = EngineId("torch", "bf16")
# Both compiled to machine code. Compiling takes minutes, so they too are used only if they are asked for by name.
TORCH_COMPILED, TORCH_BF16_COMPILED = EngineId("torch", "fp32", COMPILED), EngineId("torch", "bf16", COMPILED)
# An engine is preferred to one before it in RUNTIMES only if it is this many times as fast: measured times are noisy. torch is
# the last in RUNTIMES, as it takes seconds to load and its last bits depend on the batch size.
MIN_SPEEDUP = 1.25
_log = logging.getLogger(__name__)


class EngineStatusFacts(TypedDict):
    """An `EngineStatus` as JSON; unknown values are None."""

    engine_id: str
    state: str
    reason: str | None
    device: str | None
    relative_l2: float | None
    images_per_s: float | None


@dataclass(frozen=True)
class EngineStatus:
    """Whether an engine of a bundle can be used on this machine, and why. trial is the result of its trial, if there was one.

    state: 'trusted'; 'refused': its trial failed; 'untried'; 'absent': its package, device or compiler is missing or fails, and
    error has the details; 'unknown': this version has no such runtime. device is where it runs, '' if it cannot run. note is
    the cache file that records a refusal; delete it to have the engine tried again.
    """

    engine_id: EngineId
    state: Literal["trusted", "refused", "untried", "absent", "unknown"]
    reason: str = ""
    trial: Trial | None = None
    note: Path | None = None
    device: str = ""
    error: UniInstructError | None = None

    def facts(self) -> EngineStatusFacts:
        """The status as a dict for JSON."""
        trial = self.trial or Trial()
        return {
            "engine_id": str(self.engine_id),
            "state": self.state,
            "reason": self.reason or None,
            "device": self.device or None,
            "relative_l2": trial.relative_l2,
            "images_per_s": trial.images_per_s,
        }


@dataclass(frozen=True)
class Selection:
    """The chosen engine, its device, and the statuses of all candidates, the chosen one among them."""

    engine_id: EngineId
    device: str
    statuses: tuple[EngineStatus, ...]

    @property
    def refused(self) -> list[EngineStatus]:
        """The candidates that cannot be trusted on this machine."""
        return [status for status in self.statuses if status.state == "refused"]


def open_engine(
    bundle: Bundle | str | Path, engine: str | EngineId | None = None, *, device: str | None = None, spin: bool = True
) -> Engine:
    """Open an engine of the bundle, ready to run.

    engine: an id such as 'onnx-fp32', or a runtime such as 'onnx' for the fastest of its engines that can be trusted on this
    machine; by default the fastest of all. device: 'cpu', 'cuda' or 'cuda:1'; by default a GPU if the engine can use one.
    spin: whether threads that wait for each other may keep their cores. They do so only if each thread has a core to spare when
    the engine is opened. Pass False if others need the cores, as in a server (docs/engines.md, "Threads"); torch follows
    OMP_WAIT_POLICY. Raises what `select_engine` raises, and BundleError if a file does not match its hash.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    chosen = select_engine(bundle, engine, device)
    return load_engine(bundle, bundle.engines().get(chosen.engine_id, chosen.engine_id), device=chosen.device, spin=spin)


def load_engine(
    bundle: Bundle,
    stored: StoredEngine | EngineId,
    *,
    device: str | None = None,
    spin: bool = True,
    streams: int | None = None,
) -> Engine:
    """Load this engine of the bundle, without checking whether it can be trusted here.

    stored: an exported engine, or the id of an engine that runs the weights themselves. streams: a fixed number of streams, for
    a runtime that has them; by default the engine decides by the batch size. Raises RequestError if its device is missing.
    """
    engine_id = stored if isinstance(stored, EngineId) else stored.engine_id
    runtime = RUNTIMES[engine_id.runtime]
    device = runtime.device_for(engine_id, checked_device(device) if device is not None else None)
    Threads.here(spin).before_torch()  # the class may import torch
    engine_class = runtime.load_class()
    if isinstance(stored, EngineId):
        return engine_class(bundle, device=device, precision=engine_id.precision, target=engine_id.target)
    stream_options = {} if streams is None else {"streams": streams}  # only classes with streams take the argument
    return engine_class(bundle, stored, device=device, spin=spin, **stream_options)


def available_engines(bundle: Bundle) -> list[EngineId]:
    """The engines that `select_engine` chooses from by default, in the order of RUNTIMES and PRECISIONS, torch included."""
    order = list(RUNTIMES)
    # Exported graphs return uint8 pixels, and latents are floats.
    exported = bundle.engines() if bundle.spec.makes_pictures else ()
    known = [engine_id for engine_id in (*exported, TORCH) if engine_id.runtime in RUNTIMES]
    return sorted(known, key=lambda engine_id: (order.index(engine_id.runtime), PRECISIONS.index(engine_id.precision)))


def select_engine(bundle: Bundle, wanted: str | EngineId | None = None, device: str | None = None) -> Selection:
    """Choose the engine that `open_engine` would open, without loading it. Also returns the statuses of the other candidates.

    An exported engine is tried on this machine before its first use (engines/trials/trial.py). The fastest of those that agree
    with torch is chosen; torch itself is a candidate if it is installed, and replaces engines that do not agree. An engine or a
    device that is asked for by name is never replaced by another.

    Raises RequestError if the engine or device is unknown, if the engine was not exported, or if it does not run on the device;
    MissingExtraError if its package is missing; EngineRefusedError if no candidate can be trusted here; BundleError if files of
    the bundle are damaged.
    """
    device = checked_device(device) if device is not None else None
    candidates = _candidates(bundle, wanted, device)
    if candidates == [TORCH]:
        place = _torch().device_for(TORCH, device)
        return Selection(TORCH, place, (EngineStatus(TORCH, "trusted", device=place),))
    statuses = [_status_after_trial(bundle, engine_id, device) for engine_id in candidates if engine_id != TORCH]
    if TORCH in candidates:
        # If torch is the only one left, its speed does not matter, so its trial is skipped.
        contested = any(status.state == "trusted" for status in statuses)
        statuses.append(_status_after_trial(bundle, TORCH, device) if contested else _torch_alone(device))
    trusted = [status for status in statuses if status.state == "trusted"]
    if not trusted:
        raise refusal(statuses)
    chosen = _fastest(trusted)
    selection = Selection(chosen.engine_id, chosen.device, tuple(statuses))
    for refused in selection.refused:
        told = "engine %s cannot be used on this machine: %s; using %s instead"
        _log.warning(told, refused.engine_id, refused.reason, selection.engine_id)
    return selection


def engine_status(bundle: Bundle, engine_id: EngineId) -> EngineStatus:
    """The status of the engine on this machine, from the recorded trial. Runs nothing.

    Raises BundleError if the engine's record is damaged.
    """
    return (
        _status(bundle, engine_id, None, recorded_trial)
        if engine_id.runtime in RUNTIMES
        else EngineStatus(engine_id, "unknown")
    )


def resolve_engines(bundle: Bundle, wanted: Sequence[str], device: str | None) -> list[EngineId]:
    """The engines of the bundle that these ids or runtimes name, in the bundle's order; by default all `available_engines`.

    Raises RequestError for an unknown engine or a missing device.
    """
    device = checked_device(device) if device is not None else None
    if not wanted:
        return available_engines(bundle)
    chosen = {engine_id for word in wanted for engine_id in _candidates(bundle, word, device)}
    return [engine_id for engine_id in (*available_engines(bundle), *_opt_in_engines(bundle)) if engine_id in chosen]


def statuses(bundle: Bundle, engines: Sequence[EngineId], device: str | None, bar: Progress) -> list[EngineStatus]:
    """The statuses of these engines on this machine. Those without a recorded trial are tried, except torch in fp32.

    bar advances by 1 per engine.
    An engine that cannot run on the device is 'absent'. Raises RequestError if the device is missing.
    """
    device, found = checked_device(device) if device is not None else None, []
    for engine_id in engines:
        found.append(_torch_alone(device) if engine_id == TORCH else _status_after_trial(bundle, engine_id, device))
        bar.advance(1, str(engine_id))
    return found


def record_speeds(bundle: Bundle, speeds: Mapping[EngineStatus, float], benchmark: str) -> bool:
    """Record a benchmark's images/s, by which `select_engine` then chooses. Returns whether all could be written."""
    taken = []
    for status, images_per_s in speeds.items():
        key = trial_key(bundle, status.engine_id, RUNTIMES[status.engine_id.runtime].version(), status.device)
        taken.append(record_speed(key, recorded_trial(key), images_per_s, benchmark))
    return all(taken)


def _candidates(bundle: Bundle, wanted: str | EngineId | None, device: str | None) -> list[EngineId]:
    """The engines of the bundle that `wanted` names: at least one. Raises RequestError if there is none."""
    present = available_engines(bundle)
    if wanted is None:
        return [engine_id for engine_id in present if _runs_on(engine_id, device)]
    known = f"choose one of {', '.join([*RUNTIMES, *map(str, present), *map(str, _opt_in_engines(bundle))])}"
    if str(wanted) in RUNTIMES:
        runtime = str(wanted)
        fitting = [engine_id for engine_id in present if engine_id.runtime == runtime]
    else:
        engine_id = _parse(str(wanted), known)
        runtime, fitting = engine_id.runtime, [engine_id] if engine_id in (*present, *_opt_in_engines(bundle)) else []
    if not fitting:
        others = any(engine_id.runtime == runtime for engine_id in present)
        # A teacher cannot be exported: no command could add the engine, so the remedy lists those that exist.
        there = f"choose one of {', '.join(map(str, (*present, *_opt_in_engines(bundle))))}"
        alone = others or bundle.spec.steps > 1
        wish = f"--to {runtime}" if str(wanted) in RUNTIMES else engine_id.export_options()
        remedy = there if alone else f"uni-instruct export {quote(str(bundle.path))} {wish}"
        raise RequestError(f"bundle {bundle.path} has no {wanted} engine", remedy=remedy, param="engine")
    return fitting


def _opt_in_engines(bundle: Bundle) -> list[EngineId]:
    """Engines that need no export but are used only by name. A one-step generator of latents has no images to check them on."""
    if bundle.spec.steps > 1:
        return [TORCH_COMPILED]
    return [TORCH_BF16, TORCH_COMPILED, TORCH_BF16_COMPILED] if bundle.spec.makes_pictures else []


def _runs_on(engine_id: EngineId, device: str | None) -> bool:
    return device is None or device_type(device) in RUNTIMES[engine_id.runtime].devices


def _parse(text: str, known: str) -> EngineId:
    try:
        engine_id = EngineId.parse(text)
    except RequestError as error:
        raise RequestError(f"engine '{text[:60]}' is unknown", remedy=known, param="engine") from error
    if engine_id.runtime not in RUNTIMES:
        raise RequestError(f"engine '{text[:60]}' is unknown", remedy=known, param="engine")
    return engine_id


def _status_after_trial(bundle: Bundle, engine_id: EngineId, device: str | None) -> EngineStatus:
    """The status of the engine on this machine. Tries it first if it has no recorded trial."""

    def tried(key: TrialKey) -> Trial:
        if engine_id.target == COMPILED and recorded_trial(key) is None:
            ensure_compiled(bundle, engine_id)  # before the trial: compiling may take longer than the trial's timeout
        return try_engine(bundle, engine_id, key)

    return _status(bundle, engine_id, device, tried)


def _status(
    bundle: Bundle, engine_id: EngineId, wanted: str | None, look_up: Callable[[TrialKey], Trial | None]
) -> EngineStatus:
    runtime = RUNTIMES[engine_id.runtime]
    try:
        device = runtime.device_for(engine_id, wanted)
    except UniInstructError as error:
        return EngineStatus(engine_id, "absent", error.problem, error=error)
    key = trial_key(bundle, engine_id, runtime.version(), device)
    try:
        trial = look_up(key)
    except CompilationError as error:
        return EngineStatus(engine_id, "absent", error.problem, error=error)
    if engine_id == TORCH:  # the reference: the others are compared with it, so only its speed matters
        return EngineStatus(TORCH, "trusted", trial=trial, device=device)
    if trial is None:
        return EngineStatus(engine_id, "untried", device=device)
    if trial.problem:
        return EngineStatus(engine_id, "refused", trial.problem, trial, key.existing_path(), device)
    compared = key.reference_sha256 or trial.relative_l2 is not None
    stored, reason = bundle.engines().get(engine_id), "" if compared else "there is no reference.npz to compare it with"
    if reason and stored and not stored.record().parity:  # exported without its GPU, so it was never compared with torch
        return EngineStatus(engine_id, "refused", f"it was not checked where it was built, and {reason}", trial, device=device)
    return EngineStatus(engine_id, "trusted", reason, trial, device=device)


def _torch_alone(device: str | None) -> EngineStatus:
    try:
        return EngineStatus(TORCH, "trusted", device=_torch().device_for(TORCH, device))
    except UniInstructError as error:
        return EngineStatus(TORCH, "absent", error.problem, error=error)


def _fastest(statuses: list[EngineStatus]) -> EngineStatus:
    """The first one that no other beats by a factor of MIN_SPEEDUP; the fastest if one benchmark has measured them all."""
    trials = [status.trial or Trial() for status in statuses]
    speeds, benchmarks = [trial.images_per_s or 0.0 for trial in trials], {trial.benchmark for trial in trials}
    margin = 1.0 if len(benchmarks) == 1 and "" not in benchmarks else MIN_SPEEDUP
    return next(s for s, speed in zip(statuses, speeds, strict=True) if speed * margin >= max(speeds))


def refusal(statuses: list[EngineStatus]) -> UniInstructError:
    """The error to raise if none of these engines can be used, with its remedy."""
    refused = [status for status in statuses if status.state == "refused"]
    if not refused:
        return next(status.error for status in statuses if status.error is not None)
    problem = "; ".join(f"engine {s.engine_id} cannot be used on this machine: {s.reason}" for s in refused)
    remedy = f"use --engine {TORCH}" if _torch().is_installed() else f"pip install 'uni-instruct[{_torch().extra}]' for torch"
    if notes := " and ".join(str(status.note) for status in refused if status.note):
        remedy = f"{remedy}, or delete {notes}, where the failure is recorded, to have it checked again"
    return EngineRefusedError(problem, remedy=remedy, param="engine")


def _torch() -> Runtime:
    return RUNTIMES[TORCH.runtime]
