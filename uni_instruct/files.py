"""Files that are written whole or not at all."""

import errno
import fcntl
import hashlib
import mimetypes
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from uni_instruct.errors import DiskError, RequestError

# What json raises of text that is none, or nests deeper than Python reads.
JSON_ERRORS = (ValueError, RecursionError)
_UNWRITABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.EINVAL,
    errno.EIO,
}
# Said of whatever is written, by --out, --grid, --plot or into the cache: so no option is named. Otherwise: write elsewhere.
_REMEDIES = {
    errno.ENOSPC: "free space, or write elsewhere",
    errno.EDQUOT: "free space, or write elsewhere",
    errno.EFBIG: "raise the limit of 'ulimit -f', or write elsewhere",
    errno.ENAMETOOLONG: "give a shorter name",
}
# What the system says of files that somebody named, and what helps.
_UNUSABLE = {
    errno.EACCES: "give what you may read, or make it readable",
    errno.EPERM: "give what you may read, or make it readable",
    errno.EISDIR: "give a file, not a folder",
    errno.ELOOP: "give what the link was to lead to",
    errno.ENAMETOOLONG: "give a shorter name",
}


# Of files that Python's table of types does not have.
_SUFFIXES = frozenset(
    {".7z", ".arrow", ".avif", ".ckpt", ".feather", ".heic", ".jp2", ".jxl", ".lmdb", ".npy", ".npz", ".onnx", ".parquet"}
    | {".pickle", ".pkl", ".pt", ".pth", ".rar", ".safetensors", ".tfrecord", ".toml", ".yaml", ".yml", ".zst"}
)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A path to write to, beside the real one; moved onto it on success, removed on failure."""
    partial = _partial(path)
    with disk_errors(path):
        _refuse_other(path, path.is_file() or path.is_dir(), "file")  # of a folder the system says so itself
        make_folder(path.parent, path)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, beside the real one; it takes the place of what was there on success, is removed on failure.

    What a process that was killed has left there is removed by the next one.
    """
    partial = _partial(path)
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with disk_errors(path):
        _refuse_other(path, path.is_dir(), "folder")
        make_folder(path.parent, path)
        _remove_abandoned(path)
        try:
            with _filling(partial, path):
                yield partial
                if path.exists():
                    os.replace(path, old)
                os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not path.exists():
                os.replace(old, path)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def folder_made_once(path: Path) -> Iterator[Path]:
    """An empty folder to fill, beside the real one; moved to `path` on success, unless another process's stands there by then.

    For what is the same whoever writes it, and may be in use as soon as it is there: what stands at `path` is never moved.
    """
    # Processes in two containers may share the disk and have the same id.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with disk_errors(path):
        make_folder(path.parent, path)
        try:
            make_folder(partial, path)
            yield partial
            try:
                partial.rename(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not path.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _refuse_other(path: Path, may_go: bool, what: str) -> None:
    """Raises RequestError where something else stands at `path` than what is to take its place."""
    # A pipe or a device is somebody's, as a file in a folder's place is: /dev/null would be gone for the whole machine.
    if path.exists() and not may_go:
        raise RequestError(f"{path} is no {what}, and is not replaced by one", remedy="write elsewhere", param="out")


def make_folder(folder: Path, wanted: Path) -> None:
    """Makes a folder and those above it, for what is going to be written. Raises DiskError that names `wanted`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # what the kernel says of /proc/x: nothing can be made there
        raise DiskError(f"cannot write {wanted}: no folder can be made there", remedy="write elsewhere") from error


@contextmanager
def _filling(partial: Path, path: Path) -> Iterator[None]:
    """Within the block the empty folder is there and locked, by which it is told from one that a killed process has left."""
    while True:
        make_folder(partial, path)
        with suppress(FileNotFoundError):  # another process took it for abandoned before it was locked
            file = os.open(partial, os.O_RDONLY)
            try_lock(file, wait=True)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), partial.stat()):
                    break
            os.close(file)
    try:
        yield
    finally:
        os.close(file)


def _remove_abandoned(path: Path) -> None:
    """Removes the folders that killed processes have left half filled beside `path`: nobody holds their locks."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp")
    found: list[Path] = []
    with suppress(OSError):  # a folder that may be written, and not be read
        found = [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name) and entry.is_dir()]
    for left in found:
        with suppress(OSError):
            file = os.open(left, os.O_RDONLY)
            try:
                if try_lock(file):
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(file)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk or a folder without write permission as a DiskError that names the path."""
    try:
        yield
    except OSError as error:
        # The kernel says so of a new file in /proc. Of any other file it is a fault, and not for lack of space.
        nowhere = error.errno == errno.ENOENT and str(error.filename).startswith(str(path.parent / f".{path.name}."))
        if error.errno not in _UNWRITABLE and not nowhere:
            raise
        remedy = _REMEDIES.get(error.errno or 0, "write elsewhere")
        raise DiskError(f"cannot write {path}: {os.strerror(error.errno or 0)}", remedy=remedy) from error


def unusable(error: OSError) -> RequestError | None:
    """The system's refusal of a file by its name or its permissions, as a user's error; None for any other: a fault."""
    # Where a name may be a path among other things, each asks the system in turn: one answer for all, at the top.
    if error.filename is None or error.errno not in _UNUSABLE:
        return None
    return RequestError(
        f"{os.fsdecode(error.filename)} cannot be used: {os.strerror(error.errno)}", remedy=_UNUSABLE[error.errno]
    )


def try_lock(file: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Whether the lock of an open file, open for writing, is held now; None where its file system has no locks.

    The kernel takes it back when the file is closed or the process ends, however it ends. shared: others may share it. wait:
    until it is free.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within the block this process alone holds the lock file at `path`, which is made if need be.

    on_wait is called where another holds it. Without locks (see `try_lock`) nobody waits. Raises DiskError.
    """
    with disk_errors(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if try_lock(file) is False:
            on_wait()
            try_lock(file, wait=True)
        yield
    finally:
        os.close(file)


def is_named_as_file(path: Path) -> bool:
    """Whether the name ends as a file's does (.txt, .mp4, .h5), and no folder has it: digits-0.08 and run.v2 are folders."""
    kinds = mimetypes.MimeTypes()  # Python's own table: the system's has .old and .bak, too
    known = {*kinds.types_map[True], *kinds.encodings_map, *_SUFFIXES}
    return path.suffix.lower() in known and not path.is_dir()


def refuse_file_name(out: Path) -> None:
    """Raises RequestError where a folder is to be made under the name of a file."""
    if is_named_as_file(out):
        raise RequestError(
            f"--out {out} ends in {out.suffix}, and a folder is made",
            remedy=f"name a folder, such as {out.with_suffix('')}",
            param="out",
        )


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where downloads and what can be computed again are kept: $XDG_CACHE_HOME/uni-instruct, or below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uni-instruct"


def _partial(path: Path) -> Path:
    # What has no name of its own, as '.' and '/', can be no file, and '..' is what others stand in.
    if path.name in ("", ".."):
        raise RequestError(f"{path} has no name that can be written", remedy="name a file or folder in it", param="out")
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
