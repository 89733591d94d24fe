"""An engine's trial on this machine: does it answer as torch does, and how fast? Once a machine, noted in the user's cache.

Reduced precision is known to be silently wrong, or to crash, on some processors; what passed where it was built proves nothing
here. So a process of its own, which may die, runs the engine on the bundle's reference.npz. None of this needs torch.
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
from uni_instruct.engines.machine import machine
from uni_instruct.engines.record import EngineId
from uni_instruct.engines.workers import completed
from uni_instruct.errors import DiskError
from uni_instruct.files import atomic_file, cache_folder, sha256
from uni_instruct.reference import REFERENCE

TIMEOUT_S = 600
# Whoever sends these means the process, not the engine.
_SENT = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_one_at_a_time = threading.Lock()
# Results that no cache could take: choosing an engine and opening it both ask for them.
_unnoted: "dict[TrialKey, Trial]" = {}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrialKey:
    """What a trial's result depends on: where any of it changes, the engine is tried again.

    file_sha256 is the engine file's hash, for torch that of the weights; reference_sha256 is '' where there is no such file;
    device is where it runs, 'cpu' or 'cuda:0'.
    """

    engine_id: str
    file_sha256: str
    reference_sha256: str
    runtime: str
    device: str
    machine: str
    uni_instruct: str

    def note(self) -> Path:
        """The file in the user's cache that holds the result. Raises RuntimeError where there is no home to have one in."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]
        return cache_folder() / "engines" / f"{self.engine_id}-{digest}.json"

    def existing_note(self) -> Path | None:
        """The same where it stands."""
        try:
            return self.note() if self.note().is_file() else None
        except (OSError, RuntimeError):
            return None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What an engine did here. problem says why it is not to be used, '' where it is.

    relative_l2 and pixel_difference are the distance from torch's images, None where there was nothing to compare.
    images_per_s is that of one batch of the reference's images; or, where benchmark is not '', what the benchmark of that time
    measured. lasting: whether another trial would end the same way.
    """

    problem: str = ""
    relative_l2: float | None = None
    pixel_difference: int | None = None
    images_per_s: float | None = None
    benchmark: str = ""
    lasting: bool = True


def trial_key(bundle: Bundle, engine_id: EngineId, runtime: str, device: str) -> TrialKey:
    """The key of the bundle's engine on that device; runtime is its name and version.

    Raises BundleError where its record is damaged.
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


def noted(key: TrialKey) -> Trial | None:
    """The result that was noted; None where there is none, or it is damaged."""
    try:
        values = json.loads(key.note().read_text())
        trial = Trial(**{field.name: values[field.name] for field in fields(Trial)})
        # A file name is 64 bits of the key; the note says all of it.
        whole = {name: values[name] for name in asdict(key)} == asdict(key) and _is_plausible(trial)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):  # RuntimeError: no home, or JSON nested too deeply
        return None
    return trial if whole else None


def try_engine(bundle: Bundle, engine_id: EngineId, key: TrialKey) -> Trial:
    """The noted result, or that of a trial now, which is then noted, for this process alone where the cache cannot be written.

    Raises BundleError where the engine's files or reference.npz are damaged: that is no matter of the machine.
    """
    with _one_at_a_time:
        trial = noted(key) or _unnoted.get(key)
        if trial is not None:
            return trial
        if stored := bundle.engines().get(engine_id):
            stored.file()
        bundle.reference()
        _log.info("trying engine %s on this machine, once ...", engine_id)
        if stored and not key.reference_sha256:
            writes = f"'uni-instruct export {quote(str(bundle.path))} --to onnx' writes it"
            _log.warning("there is no %s to hold engine %s against, so that it is only timed; %s", REFERENCE, engine_id, writes)
        trial = _run(bundle.path, engine_id, key.device)
        if trial.lasting:
            _note(key, trial)
            if noted(key) is None:
                _unnoted[key] = trial
        return trial


def note_speed(key: TrialKey, trial: Trial | None, images_per_s: float, benchmark: str) -> bool:
    """Notes what a benchmark measured in place of the trial's own speed; whether the cache could be written."""
    measured = replace(trial or Trial(), images_per_s=images_per_s, benchmark=benchmark)
    with _one_at_a_time:
        _note(key, measured)
    return noted(key) == measured


def _run(bundle: Path, engine_id: EngineId, device: str) -> Trial:
    def tell(past_s: float) -> None:
        _log.info("trying engine %s: %.0f s of at most %d", engine_id, past_s, TIMEOUT_S)

    arguments = [str(bundle.resolve()), str(engine_id), device]
    done = completed("uni_instruct.engines.trial_worker", arguments, tell, timeout_s=TIMEOUT_S)
    if done is None:
        return Trial(problem=f"it did not answer in {TIMEOUT_S} s", lasting=False)
    if done.returncode < 0:
        return Trial(problem=f"it died of {signal.Signals(-done.returncode).name}", lasting=-done.returncode not in _SENT)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return Trial(problem=f"it could not be tried: {reason[:300]}", lasting=False)
    return Trial(**json.loads(lines[-1]))


def _note(key: TrialKey, trial: Trial) -> None:
    try:
        with atomic_file(key.note()) as partial:
            partial.write_text(json.dumps(asdict(key) | asdict(trial), indent=2) + "\n")
    except (DiskError, OSError, RuntimeError) as error:
        _log.info("the trial of %s cannot be noted, the next process tries again: %s", key.engine_id, error)


def _is_plausible(trial: Trial) -> bool:
    def is_number(value: object) -> bool:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0)

    numbers = (trial.relative_l2, trial.pixel_difference, trial.images_per_s)
    texts = isinstance(trial.problem, str) and isinstance(trial.benchmark, str)
    return texts and all(map(is_number, numbers)) and bool(trial.problem or trial.images_per_s)
