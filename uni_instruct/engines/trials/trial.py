"""The trial of an engine on this machine: does it agree with torch, and how fast is it? The user's cache keeps the result.

On some processors, reduced precision silently returns wrong values or crashes, whatever a check on another machine has found.
So the engine is run on the bundle's reference.npz here, in a process of its own, as it may crash. Needs no torch.
"""

import hashlib
import json
import logging
import signal
import threading
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from shlex import quote

from uni_instruct import __version__
from uni_instruct.bundle import Bundle
from uni_instruct.engines.hardware.machine import machine
from uni_instruct.engines.record import EngineId
from uni_instruct.engines.worker_process import run_worker
from uni_instruct.errors import DiskError
from uni_instruct.reference import REFERENCE
from uni_instruct.system.files import atomic_file, cache_folder, sha256

TIMEOUT_S = 600
# Signals that a user or the system sends to a process: death by one of them says nothing about the engine.
_EXTERNAL_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_one_at_a_time = threading.Lock()
# Results that could not be written to the cache. Choosing an engine and opening it both need them.
_unrecorded: "dict[TrialKey, Trial]" = {}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrialKey:
    """All that a trial's result depends on. If any of it changes, the engine is tried again.

    file_sha256: hash of the engine's file; for torch, of the weights. reference_sha256: '' if there is no reference.npz.
    runtime: its name and version. device: where the engine runs, 'cpu' or 'cuda:0'. uni_instruct: this package's version.
    """

    engine_id: str
    file_sha256: str
    reference_sha256: str
    runtime: str
    device: str
    machine: str
    uni_instruct: str

    def note(self) -> Path:
        """The path of the result in the user's cache. Raises RuntimeError if there is no home directory to hold one."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]
        return cache_folder() / "engines" / f"{self.engine_id}-{digest}.json"

    def existing_path(self) -> Path | None:
        """The path of the result if the file exists, else None."""
        try:
            return self.note() if self.note().is_file() else None
        except (OSError, RuntimeError):
            return None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The result of a trial. problem: why the engine must not be used; '' if it can be.

    relative_l2 and pixel_difference: the distance from torch's images; None if there was nothing to compare with.
    images_per_s: of one batch of the reference's images; if benchmark is not '', as measured by the benchmark at that time.
    lasting: whether another trial would end the same way. Only such results are recorded.
    """

    problem: str = ""
    relative_l2: float | None = None
    pixel_difference: int | None = None
    images_per_s: float | None = None
    benchmark: str = ""
    lasting: bool = True


def trial_key(bundle: Bundle, engine_id: EngineId, runtime: str, device: str) -> TrialKey:
    """The key for the bundle's engine on that device. runtime: the runtime's name and version.

    Raises BundleError if the engine's record is damaged.
    """
    stored, reference = bundle.engines().get(engine_id), bundle.path / REFERENCE
    return TrialKey(
        engine_id=str(engine_id),
        file_sha256=stored.record().file_sha256 if stored else bundle.weights_sha256,
        reference_sha256=sha256(reference) if reference.is_file() else "",
        runtime=runtime,
        device=device,
        machine=machine(),
        uni_instruct=__version__,
    )


def recorded_trial(key: TrialKey) -> Trial | None:
    """The recorded result; None if there is none, or if its file is damaged."""
    try:
        values = json.loads(key.note().read_text())
        trial = Trial(**{field.name: values[field.name] for field in fields(Trial)})
        # The file name holds only 64 bits of the key's hash, so compare the whole key.
        whole = {name: values[name] for name in asdict(key)} == asdict(key) and _is_plausible(trial)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: no home, or JSON nested too deeply
        return None
    return trial if whole else None


def try_engine(bundle: Bundle, engine_id: EngineId, key: TrialKey) -> Trial:
    """The recorded result, or else that of a trial now, which is recorded if it lasts (without a writable cache: in memory).

    Raises BundleError if the engine's files or reference.npz are damaged: that is no result about this machine.
    """
    # Two trials at once would measure each other's load.
    with _one_at_a_time:
        trial = recorded_trial(key) or _unrecorded.get(key)
        if trial is not None:
            return trial
        if stored := bundle.engines().get(engine_id):
            stored.file()
        bundle.reference()
        _log.info("checking engine %s on this machine before its first use ...", engine_id)
        if stored and not key.reference_sha256:
            writes = f"'uni-instruct export {quote(str(bundle.path))} --to onnx' writes that file"
            _log.warning("there is no %s to compare engine %s with, so it is only timed; %s", REFERENCE, engine_id, writes)
        trial = _run(bundle.path, engine_id, key.device)
        if trial.lasting:
            _note(key, trial)
            if recorded_trial(key) is None:
                _unrecorded[key] = trial
        return trial


def record_speed(key: TrialKey, trial: Trial | None, images_per_s: float, benchmark: str) -> bool:
    """Record a benchmark's speed in place of the trial's own. Returns whether the cache could be written."""
    measured = replace(trial or Trial(), images_per_s=images_per_s, benchmark=benchmark)
    with _one_at_a_time:
        _note(key, measured)
    return recorded_trial(key) == measured


def _run(bundle: Path, engine_id: EngineId, device: str) -> Trial:
    def on_progress(past_s: float) -> None:
        _log.info("checking engine %s: %.0f of at most %d s", engine_id, past_s, TIMEOUT_S)

    arguments = [str(bundle.resolve()), str(engine_id), device]
    done = run_worker("uni_instruct.engines.trials.worker", arguments, on_progress, timeout_s=TIMEOUT_S)
    if done is None:
        return Trial(problem=f"it did not answer in {TIMEOUT_S} s", lasting=False)
    if done.returncode < 0:
        return Trial(
            problem=f"its process was ended by {signal.Signals(-done.returncode).name}",
            lasting=-done.returncode not in _EXTERNAL_SIGNALS,
        )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return Trial(problem=f"it could not be checked: {reason[:300]}", lasting=False)
    return Trial(**json.loads(lines[-1]))


def _note(key: TrialKey, trial: Trial) -> None:
    try:
        with atomic_file(key.note()) as partial:
            partial.write_text(json.dumps(asdict(key) | asdict(trial), indent=2) + "\n")
    except (DiskError, OSError, RuntimeError) as error:
        _log.info("the check of engine %s cannot be recorded, so the next process repeats it: %s", key.engine_id, error)


def _is_plausible(trial: Trial) -> bool:
    def is_number(value: object) -> bool:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0)

    # A trial has either failed, or measured a speed.
    numbers = (trial.relative_l2, trial.pixel_difference, trial.images_per_s)
    texts = isinstance(trial.problem, str) and isinstance(trial.benchmark, str)
    return texts and all(map(is_number, numbers)) and bool(trial.problem or trial.images_per_s)
