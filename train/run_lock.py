"""Who works on a run: a lock on RUN/run.lock, which the system takes back from a process however it ends, and a note in it."""

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
from uni_instruct.files import JSON_ERRORS

LOCK = "run.lock"
# Whoever asks for a run's status holds its lock for microseconds; a training that starts just then waits that out.
PATIENCE_S = 1.0
FINISHED, INTERRUPTED, FAILED = "finished", "interrupted", "failed"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """The process that works on a run, or did last; started is in seconds since 1970.

    program is how the command line was called, without its arguments. ended is None while the process works, and for ever
    after kill -9.
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
        """Whether its number means a process of this machine."""
        return self.host == platform.node()

    def __str__(self) -> str:
        return f"process {self.pid} on {'this machine' if self.is_local else self.host}"


class RunLock:
    """The right to write a run's folder, as a context: it ends with the block, or with the process.

    Where the file system has no locks, nothing is held and a warning is logged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: int | None = None
        self._worker: Worker | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Before the lock goes: who takes it next must find how this one ended.
        if self._worker is not None:
            self._write(dataclasses.replace(self._worker, ended=_ending(error)))
        if self._file is not None:
            os.close(self._file)

    def acquire(self) -> bool:
        """Takes the lock, with the folder made if need be; False where another process has it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return True  # nobody writes here; whoever tries next names the file and the reason
        deadline = time.monotonic() + PATIENCE_S
        while (held := _try_lock(self._file, fcntl.LOCK_EX)) is False:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        if held is None:
            log.warning("%s is on a file system without locks: start no second training there", self.folder)
        return True

    def note(self, devices: int) -> None:
        """Writes down that this process works on the run now; nothing in a process that did not acquire the lock."""
        self._worker = Worker(
            pid=os.getpid(),
            host=platform.node(),
            started=time.time(),
            cwd=str(Path.cwd()),
            program=program(),
            devices=devices,
            nice=os.nice(0) if hasattr(os, "nice") else 0,
        )
        self._write(self._worker)

    def _write(self, worker: Worker) -> None:
        if self._file is None:
            return
        text = json.dumps(dataclasses.asdict(worker)).encode() + b"\n"
        with suppress(OSError):  # a full disk: the lock holds without a note
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text, 0)


def is_locked(folder: Path) -> bool | None:
    """Whether a process holds the run; None where the file system does not tell. Opens nothing for writing."""
    try:
        # Not made where it is missing: asking leaves no trace in a run.
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


def read_worker(folder: Path) -> Worker | None:
    """Who works on the run, or did last; None where there is no note, or none that can be read."""
    try:
        values = json.loads((folder / LOCK).read_text())
        # Whatever stands there: a note is a courtesy, and never a reason to fail.
        return Worker(**values | {"program": tuple(values["program"])})
    except (OSError, *JSON_ERRORS, TypeError, KeyError):
        return None


def refuse_taken(folder: Path) -> None:
    """Raises RequestError where another process works on the run."""
    if is_locked(folder):
        raise taken(folder)


def refuse_foreign(folder: Path, names: Sequence[str] = ("teacher", "generator", "report"), mark: str = "recipe.yaml") -> None:
    """Raises RequestError where a training, or a lab, would take the place of folders that none made. mark: what one leaves."""
    for name in names:
        if not (folder / mark).exists() and (folder / name).is_dir() and any((folder / name).iterdir()):
            raise RequestError(f"{folder / name} would be replaced, and no training made it", remedy="choose another --out")


def taken(folder: Path) -> RequestError:
    """What is said to a second training in one folder."""
    worker = read_worker(folder)
    who = "another process" if worker is None else str(worker)
    stop = f", or stop it with 'kill {worker.pid}'" if worker is not None and worker.is_local else ""
    return RequestError(
        f"{folder} is being trained by {who}", remedy=f"wait for it{stop}, or choose another --out", param="out"
    )


def _try_lock(file: int, kind: int) -> bool | None:
    """Whether the lock was free, and is held now; None where there are no locks."""
    try:
        # flock, not lockf: that one is lost when any other handle of the file is closed.
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
    """How this command line was called: the script of an environment, a module, or torchrun."""
    module = (sys.executable, "-m")
    # Under torchrun sys.argv names this process alone; what the user called is gone, and put together again.
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
