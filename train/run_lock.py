"""The lock file RUN/run.lock, which keeps a run to one process and describes that process.

The operating system releases the lock when the process ends, in whatever way.
"""

import dataclasses
import errno
import fcntl
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.system.files import JSON_ERRORS

LOCK = "run.lock"
# `is_locked` (train --status) holds a shared lock for microseconds. A training that starts meanwhile retries for this long.
PATIENCE_S = 1.0
FINISHED, INTERRUPTED, FAILED = "finished", "interrupted", "failed"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunProcess:
    """The process that works on a run, or the last one that did. started: seconds since 1970.

    program: the command line without its arguments. ended: how the process ended. It is None while the process works, and stays
    None if the process was killed (kill -9).
    """

    pid: int
    host: str
    started: float
    cwd: str
    program: tuple[str, ...]
    devices: int
    nice: int
    ended: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the process is or was on this machine, so that its pid means something here."""
        return self.host == platform.node()

    def __str__(self) -> str:
        return f"process {self.pid} on {'this machine' if self.is_local else self.host}"


class RunLock:
    """A context manager that holds the exclusive lock of a run's folder until the block or the process ends.

    On a file system without locks nothing is held, and a warning is logged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: int | None = None
        self._worker: RunProcess | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Written before the lock is released, so that the next owner reads how this process ended.
        if self._worker is not None:
            self._write(dataclasses.replace(self._worker, ended=_ending(error)))
        if self._file is not None:
            os.close(self._file)

    def acquire(self) -> bool:
        """Take the lock, creating the folder if necessary. Returns False if another process holds it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return True  # the folder is not writable; the first real write raises an error with file and reason
        deadline = time.monotonic() + PATIENCE_S
        while (held := _try_lock(self._file, fcntl.LOCK_EX)) is False:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        if held is None:
            log.warning("%s is on a file system without file locks: do not start a second training in this folder", self.folder)
        return True

    def note(self, devices: int) -> None:
        """Describe this process in the lock file. Does nothing in a process that has not acquired the lock."""
        self._worker = RunProcess(
            pid=os.getpid(),
            host=platform.node(),
            started=time.time(),
            cwd=str(Path.cwd()),
            program=program(),
            devices=devices,
            nice=os.nice(0) if hasattr(os, "nice") else 0,
        )
        self._write(self._worker)

    def _write(self, worker: RunProcess) -> None:
        if self._file is None:
            return
        text = json.dumps(dataclasses.asdict(worker)).encode() + b"\n"
        with suppress(OSError):  # on a full disk the lock is held without a description
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text, 0)


def is_locked(folder: Path) -> bool | None:
    """Whether a process holds the run's lock; None if that cannot be determined. Opens nothing for writing."""
    try:
        # Opened without O_CREAT, so that `train --status` does not write into the run.
        file = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        free = _try_lock(file, fcntl.LOCK_SH)
    finally:
        os.close(file)
    return None if free is None else not free


def read_run_process(folder: Path) -> RunProcess | None:
    """The process that works on the run, or the last one that did; None if the lock file has no readable description."""
    try:
        values = json.loads((folder / LOCK).read_text())
        # An unreadable description is ignored, because it is only information for the user.
        return RunProcess(**values | {"program": tuple(values["program"])})
    except (OSError, *JSON_ERRORS, TypeError, KeyError):
        return None


def refuse_in_use(folder: Path) -> None:
    """Raise RequestError if another process holds the run's lock."""
    if is_locked(folder):
        raise in_use_error(folder)


def refuse_foreign(folder: Path, names: Sequence[str] = ("teacher", "generator", "report"), mark: str = "recipe.yaml") -> None:
    """Raise RequestError if a training or a lab would replace folders that none made. mark: the file that identifies one."""
    for name in names:
        if not (folder / mark).exists() and (folder / name).is_dir() and any((folder / name).iterdir()):
            raise RequestError(f"{folder / name} would be replaced, and no training made it", remedy="choose another --out")


def in_use_error(folder: Path) -> RequestError:
    """The error for a second training in the same folder."""
    worker = read_run_process(folder)
    who = "another process" if worker is None else str(worker)
    stop = f", or stop it with 'kill {worker.pid}'" if worker is not None and worker.is_local else ""
    return RequestError(
        f"{folder} is being trained by {who}", remedy=f"wait until it has finished{stop}, or choose another --out", param="out"
    )


def _try_lock(file: int, kind: int) -> bool | None:
    """Try to take the lock without waiting. True: taken; False: held by another process; None: locks are not supported."""
    try:
        # flock rather than lockf: a process loses a lockf lock when it closes any descriptor of the file.
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def _ending(error: BaseException | None) -> str:
    if error is None:
        return FINISHED
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    kind = "" if isinstance(error, UniInstructError) else f"{type(error).__name__}: "
    return f"{FAILED}: {kind}{' '.join(str(error).split())}"


def program() -> tuple[str, ...]:
    """The words with which this command line was called, without arguments: a script, a module, or torchrun."""
    module = (sys.executable, "-m")
    # Under torchrun sys.argv is that of a worker process, so the user's command is reconstructed.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return (
            *module,
            "torch.distributed.run",
            "--nproc-per-node",
            os.environ["LOCAL_WORLD_SIZE"],
            *module[1:],
            "uni_instruct",
        )
    script = Path(sys.argv[0])
    return (str(script.absolute()),) if script.name == "uni-instruct" else (*module, "uni_instruct")
