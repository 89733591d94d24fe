"""Engine: whatever turns noise into images. The caller never learns which runtime it holds."""

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
from uni_instruct.progress import Progress

__all__ = ["RUNTIMES", "TORCH", "Engine", "EngineId", "EngineStatus", "Outputs", "Runtime", "Selection"]
__all__ += ["available_engines", "engine_status", "load_engine", "open_engine", "select_engine"]

# The engine that every bundle has: the weights themselves, as trained.
TORCH = EngineId("torch", "fp32")
# The same with its large convolutions in bf16: tried as exported engines are, and chosen only where it is asked for.
TORCH_BF16 = EngineId("torch", "bf16")
# Both as machine code, which takes minutes to make: for whoever asks for it.
TORCH_COMPILED, TORCH_BF16_COMPILED = EngineId("torch", "fp32", COMPILED), EngineId("torch", "bf16", COMPILED)
# How many times as fast another engine must be to be preferred to one that stands before it in RUNTIMES: times vary, and torch
# takes seconds to load and gives other last bits in other batches.
MIN_SPEEDUP = 1.25
_log = logging.getLogger(__name__)


class EngineStatusFacts(TypedDict):
    """A `EngineStatus` for JSON; what is not known is None."""

    engine_id: str
    state: str
    reason: str | None
    device: str | None
    relative_l2: float | None
    images_per_s: float | None


@dataclass(frozen=True)
class EngineStatus:
    """How an engine of a bundle stands on this machine, and why, in words; trial is what it did here, where it was tried.

    state: 'trusted'; 'refused', as its trial found; 'untried'; 'absent' where its package, its device or its compiler is not
    there, or fails, as error says; 'unknown' where this version has no such runtime. device is where it runs, '' where it does
    not. note is the file that keeps a refusal: without it the engine is tried again.
    """

    engine_id: EngineId
    state: Literal["trusted", "refused", "untried", "absent", "unknown"]
    reason: str = ""
    trial: Trial | None = None
    note: Path | None = None
    device: str = ""
    error: UniInstructError | None = None

    def facts(self) -> EngineStatusFacts:
        """The same for JSON."""
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
    """The engine that was chosen, the device that it runs on, and how it and the others that came into question stand."""

    engine_id: EngineId
    device: str
    statuses: tuple[EngineStatus, ...]

    @property
    def refused(self) -> list[EngineStatus]:
        """Those that cannot be trusted on this machine."""
        return [status for status in self.statuses if status.state == "refused"]


def open_engine(
    bundle: Bundle | str | Path, engine: str | EngineId | None = None, *, device: str | None = None, spin: bool = True
) -> Engine:
    """The bundle's engine of that id; of a bare runtime, or without a word, the fastest that can be trusted on this machine.

    device: 'cpu', 'cuda' or 'cuda:1'; without a word a GPU where the engine can use one. spin: whether its threads may keep
    their cores while they wait for each other. They do where a core is to spare for each at this moment; where others will want
    the cores, as in a server, give False (docs/engines.md, "Threads"). torch goes by OMP_WAIT_POLICY.
    Raises as `select_engine` does, and BundleError where a file does not match its hash.
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
    """That engine of the bundle, by its id where it runs the weights themselves, whether or not it can be trusted here.

    streams: for a runtime that has them, always so many; without a word the engine decides by the batch.
    Raises RequestError without its device.
    """
    engine_id = stored if isinstance(stored, EngineId) else stored.engine_id
    runtime = RUNTIMES[engine_id.runtime]
    device = runtime.device_for(engine_id, checked_device(device) if device is not None else None)
    Threads.here(spin).before_torch()
    engine_class = runtime.load_class()
    if isinstance(stored, EngineId):
        return engine_class(bundle, device=device, precision=engine_id.precision, target=engine_id.target)
    shared_out = {} if streams is None else {"streams": streams}
    return engine_class(bundle, stored, device=device, spin=spin, **shared_out)


def available_engines(bundle: Bundle) -> list[EngineId]:
    """What this bundle is opened with where none is named, in the order of RUNTIMES and precision. Torch needs no export."""
    order = list(RUNTIMES)
    # Latents are floats: no exported engine hands them out.
    exported = bundle.engines() if bundle.spec.makes_pictures else ()
    known = [engine_id for engine_id in (*exported, TORCH) if engine_id.runtime in RUNTIMES]
    return sorted(known, key=lambda engine_id: (order.index(engine_id.runtime), PRECISIONS.index(engine_id.precision)))


def select_engine(bundle: Bundle, wanted: str | EngineId | None = None, device: str | None = None) -> Selection:
    """The engine that open_engine would open, without loading it, and how the others that fit stand on this machine.

    An exported engine is tried before its first use here (engines/trials/trial.py). Of those that answer as torch does, torch among
    them where it is installed, the fastest is chosen; torch takes the place of those that do not. An engine asked for by its id
    is that one or an error, and so is a device.

    Raises RequestError for an unknown engine or device, one that was not exported or does not run there, MissingExtraError
    without its package, EngineRefusedError where none can be trusted here, BundleError where files of the bundle are damaged.
    """
    device = checked_device(device) if device is not None else None
    candidates = _candidates(bundle, wanted, device)
    if candidates == [TORCH]:
        place = _torch().device_for(TORCH, device)
        return Selection(TORCH, place, (EngineStatus(TORCH, "trusted", device=place),))
    statuses = [_status_after_trial(bundle, engine_id, device) for engine_id in candidates if engine_id != TORCH]
    if TORCH in candidates:
        # Where torch alone is left, nothing depends on its speed.
        contested = any(status.state == "trusted" for status in statuses)
        statuses.append(_status_after_trial(bundle, TORCH, device) if contested else _torch_alone(device))
    trusted = [status for status in statuses if status.state == "trusted"]
    if not trusted:
        raise refusal(statuses)
    chosen = _fastest(trusted)
    selection = Selection(chosen.engine_id, chosen.device, tuple(statuses))
    for refused in selection.refused:
        told = "engine %s is refused on this machine: %s; %s takes its place"
        _log.warning(told, refused.engine_id, refused.reason, selection.engine_id)
    return selection


def engine_status(bundle: Bundle, engine_id: EngineId) -> EngineStatus:
    """How that engine of the bundle stands on this machine, by the trial on record; nothing is run.

    Raises BundleError where the engine's record is damaged.
    """
    return (
        _status(bundle, engine_id, None, recorded_trial)
        if engine_id.runtime in RUNTIMES
        else EngineStatus(engine_id, "unknown")
    )


def wanted_engines(bundle: Bundle, wanted: Sequence[str], device: str | None) -> list[EngineId]:
    """The engines of the bundle that are meant by ids or runtimes, all that no word is needed for without one, in their order.

    Raises RequestError for an unknown engine, or a device that is not there.
    """
    device = checked_device(device) if device is not None else None
    if not wanted:
        return available_engines(bundle)
    chosen = {engine_id for word in wanted for engine_id in _candidates(bundle, word, device)}
    return [engine_id for engine_id in (*available_engines(bundle), *_only_asked_for(bundle)) if engine_id in chosen]


def statuses(bundle: Bundle, engines: Sequence[EngineId], device: str | None, bar: Progress) -> list[EngineStatus]:
    """How these engines of the bundle stand here, after their trials; bar advances by 1 for each.

    What cannot run on the device is 'absent'. Raises RequestError where the device is not there.
    """
    device, found = checked_device(device) if device is not None else None, []
    for engine_id in engines:
        found.append(_torch_alone(device) if engine_id == TORCH else _status_after_trial(bundle, engine_id, device))
        bar.advance(1, str(engine_id))
    return found


def record_speeds(bundle: Bundle, speeds: Mapping[EngineStatus, float], benchmark: str) -> bool:
    """Has `select_engine` choose by these images/s of a benchmark; whether the user's cache took them all."""
    taken = []
    for status, images_per_s in speeds.items():
        key = trial_key(bundle, status.engine_id, RUNTIMES[status.engine_id.runtime].version(), status.device)
        taken.append(record_speed(key, recorded_trial(key), images_per_s, benchmark))
    return all(taken)


def _candidates(bundle: Bundle, wanted: str | EngineId | None, device: str | None) -> list[EngineId]:
    """The engines of the bundle that fit what is wanted; at least one. Raises RequestError where there is none."""
    present = available_engines(bundle)
    if wanted is None:
        return [engine_id for engine_id in present if _runs_on(engine_id, device)]
    known = f"choose one of {', '.join([*RUNTIMES, *map(str, present), *map(str, _only_asked_for(bundle))])}"
    if str(wanted) in RUNTIMES:
        runtime = str(wanted)
        fitting = [engine_id for engine_id in present if engine_id.runtime == runtime]
    else:
        engine_id = _parse(str(wanted), known)
        runtime, fitting = engine_id.runtime, [engine_id] if engine_id in (*present, *_only_asked_for(bundle)) else []
    if not fitting:
        others = any(engine_id.runtime == runtime for engine_id in present)
        # A teacher is not exported, so that what it has is all that it can have.
        there = f"choose one of {', '.join(map(str, (*present, *_only_asked_for(bundle))))}"
        alone = others or bundle.spec.steps > 1
        wish = f"--to {runtime}" if str(wanted) in RUNTIMES else engine_id.export_options()
        remedy = there if alone else f"uni-instruct export {quote(str(bundle.path))} {wish}"
        raise RequestError(f"bundle {bundle.path} has no {wanted} engine", remedy=remedy, param="engine")
    return fitting


def _only_asked_for(bundle: Bundle) -> list[EngineId]:
    """Engines that no export makes and no choice falls on. There must be images to hold them against."""
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
    """How the engine stands here, after its trial where it had none."""

    def tried(key: TrialKey) -> Trial:
        if engine_id.target == COMPILED and recorded_trial(key) is None:
            ensure_compiled(bundle, engine_id)  # first, as it may take longer than a trial may
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
    if engine_id == TORCH:  # what others are held against: only its speed is of interest
        return EngineStatus(TORCH, "trusted", trial=trial, device=device)
    if trial is None:
        return EngineStatus(engine_id, "untried", device=device)
    if trial.problem:
        return EngineStatus(engine_id, "refused", trial.problem, trial, key.existing_note(), device)
    compared = key.reference_sha256 or trial.relative_l2 is not None
    stored, reason = bundle.engines().get(engine_id), "" if compared else "no reference.npz to hold it against"
    if reason and stored and not stored.record().parity:  # built for a GPU that was not there: nobody has ever compared it
        return EngineStatus(engine_id, "refused", f"untried where it was built, and {reason}", trial, device=device)
    return EngineStatus(engine_id, "trusted", reason, trial, device=device)


def _torch_alone(device: str | None) -> EngineStatus:
    try:
        return EngineStatus(TORCH, "trusted", device=_torch().device_for(TORCH, device))
    except UniInstructError as error:
        return EngineStatus(TORCH, "absent", error.problem, error=error)


def _fastest(statuses: list[EngineStatus]) -> EngineStatus:
    """The first that no other outruns by MIN_SPEEDUP; of those that one benchmark compared, the fastest."""
    trials = [status.trial or Trial() for status in statuses]
    speeds, benchmarks = [trial.images_per_s or 0.0 for trial in trials], {trial.benchmark for trial in trials}
    margin = 1.0 if len(benchmarks) == 1 and "" not in benchmarks else MIN_SPEEDUP
    return next(s for s, speed in zip(statuses, speeds, strict=True) if speed * margin >= max(speeds))


def refusal(statuses: list[EngineStatus]) -> UniInstructError:
    """Why none of them can be used, and what to do about it."""
    refused = [status for status in statuses if status.state == "refused"]
    if not refused:
        return next(status.error for status in statuses if status.error is not None)
    problem = "; ".join(f"engine {s.engine_id} is refused on this machine: {s.reason}" for s in refused)
    remedy = f"use --engine {TORCH}" if _torch().is_installed() else f"pip install 'uni-instruct[{_torch().extra}]' for torch"
    if notes := " and ".join(str(status.note) for status in refused if status.note):
        remedy = f"{remedy}, or delete {notes} to have it tried again"
    return EngineRefusedError(problem, remedy=remedy, param="engine")


def _torch() -> Runtime:
    return RUNTIMES[TORCH.runtime]
