"""Atomic writes of files and folders, file locks, and disk errors in words."""

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

# What json raises for text that is not JSON, or is nested too deeply for Python's recursion limit.
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
# Remedies for writing. They name no option, since the path may come from --out, --grid, --plot or be in the cache. The default
# is "write elsewhere".
_REMEDIES = {
    errno.ENOSPC: "free space, or write elsewhere",
    errno.EDQUOT: "free space, or write elsewhere",
    errno.EFBIG: "raise the limit of 'ulimit -f', or write elsewhere",
    errno.ENAMETOOLONG: "give a shorter name",
}
# Remedies for paths that the user gave and the system refuses.
_UNUSABLE = {
    errno.EACCES: "give a path that you may read, or change its permissions",
    errno.EPERM: "give a path that you may read, or change its permissions",
    errno.EISDIR: "give a file, not a folder",
    errno.ELOOP: "give the file or folder itself, not the symbolic link",
    errno.ENAMETOOLONG: "give a shorter name",
}


# Of files that Python's table of types does not have.
_SUFFIXES = frozenset(
    {".7z", ".arrow", ".avif", ".ckpt", ".feather", ".heic", ".jp2", ".jxl", ".lmdb", ".npy", ".npz", ".onnx", ".parquet"}
    | {".pickle", ".pkl", ".pt", ".pth", ".rar", ".safetensors", ".tfrecord", ".toml", ".yaml", ".yml", ".zst"}
)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success it is moved to `path`; on failure it is removed. Raises DiskError."""
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
    """Yield an empty temporary folder beside `path`. On success it replaces `path`; on failure it is removed.

    Temporary folders that killed processes left there are removed first. Raises DiskError.
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
                if path.exists():  # moved away first, because a rename cannot replace a folder that is not empty
                    os.replace(path, old)
                os.replace(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if old.exists() and not path.exists():  # interrupted between both renames: put the old folder back
                os.replace(old, path)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_folder_if_absent(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`. On success it is moved to `path`, unless `path` exists by then.

    For content that is the same whichever process writes it. An existing `path` is never moved, because other processes may
    be using it. Raises DiskError.
    """
    # A random name, not the process id: two containers that share the disk may use the same ids.
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
    """Raise RequestError if `path` exists and is of another kind than what will replace it."""
    # Renaming onto a device removes it: /dev/null would be gone for the whole machine.
    if path.exists() and not may_go:
        raise RequestError(f"{path} is not a {what}, so it is not replaced", remedy="write elsewhere", param="out")


def make_folder(folder: Path, wanted: Path) -> None:
    """Create a folder and its parents, so that `wanted` can be written. Raises DiskError that names `wanted`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # the kernel's answer below /proc, where no folder can be created
        raise DiskError(f"cannot write {wanted}: no folder can be created there", remedy="write elsewhere") from error


@contextmanager
def _filling(partial: Path, path: Path) -> Iterator[None]:
    """Create the empty folder and hold its lock within the block. A folder without a held lock counts as abandoned."""
    while True:
        make_folder(partial, path)
        # Before it is locked, another process may remove it as abandoned. Then it is created again.
        with suppress(FileNotFoundError):
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
    """Remove partly filled folders beside `path` that killed processes left. No process holds their locks."""
    name = re.compile(rf"\.{re.escape(path.name)}\.\d+\.tmp")
    found: list[Path] = []
    with suppress(OSError):  # the parent folder may be writable but not readable
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
    """Raise a full disk, a folder without write permission and their like as a DiskError that names the path."""
    try:
        yield
    except OSError as error:
        # The kernel answers ENOENT for a new file in /proc. For any other file ENOENT is a bug of ours, so it is raised as is.
        nowhere = error.errno == errno.ENOENT and str(error.filename).startswith(str(path.parent / f".{path.name}."))
        if error.errno not in _UNWRITABLE and not nowhere:
            raise
        remedy = _REMEDIES.get(error.errno or 0, "write elsewhere")
        raise DiskError(f"cannot write {path}: {os.strerror(error.errno or 0)}", remedy=remedy) from error


def as_path_error(error: OSError) -> RequestError | None:
    """A RequestError for a path that the system refuses for its name or permissions; None for any other error.

    Called once, at the top of the command line: many arguments may be a path or something else, and all of them try the path.
    """
    # No file name, or another error number: a bug of ours, which keeps its traceback.
    if error.filename is None or error.errno not in _UNUSABLE:
        return None
    return RequestError(
        f"{os.fsdecode(error.filename)} cannot be used: {os.strerror(error.errno)}", remedy=_UNUSABLE[error.errno]
    )


def try_lock(file: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Lock an open file (flock) and return whether this process holds the lock now; None if the file system has no locks.

    The kernel releases the lock when the file is closed or the process ends, even if it is killed.

    file: a file descriptor. shared: take a shared lock. wait: block until the lock is free.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the exclusive lock of the file at `path` within the block. The file is created if it is missing.

    on_wait: called before waiting for another process. On a file system without locks (see `try_lock`) there is no waiting.
    Raises DiskError.
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
    """Whether the name ends like a file's (.txt, .mp4, .h5) and is not a folder already. digits-0.08 and run.v2 do not."""
    kinds = mimetypes.MimeTypes()  # Python's own table: the system's has .old and .bak, too
    known = {*kinds.types_map[True], *kinds.encodings_map, *_SUFFIXES}
    return path.suffix.lower() in known and not path.is_dir()


def refuse_file_name(out: Path) -> None:
    """Raise RequestError if a folder would be created under a name that ends like a file's."""
    if is_named_as_file(out):
        raise RequestError(
            f"--out {out} ends in {out.suffix}, and a folder is made",
            remedy=f"name a folder, such as {out.with_suffix('')}",
            param="out",
        )


def sha256(path: Path) -> str:
    """The file's SHA-256 digest in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """The folder of downloads and other files that can be made again: $XDG_CACHE_HOME/uni-instruct or ~/.cache/uni-instruct."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uni-instruct"


def _partial(path: Path) -> Path:
    # '.' and '/' have no name, so nothing can replace them, and '..' contains other files.
    if path.name in ("", ".."):
        raise RequestError(f"{path} itself cannot be written", remedy="name a file or folder in it", param="out")
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
