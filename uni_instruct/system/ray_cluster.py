"""Connect to a Ray cluster or start a local Ray, check its nodes' versions, and send files that the nodes lack."""

import hashlib
import importlib
import logging
import os
import socket
from pathlib import Path
from types import ModuleType

from uni_instruct import __version__
from uni_instruct.engines.hardware.threads import usable_cpus
from uni_instruct.errors import MissingExtraError, RequestError, UniInstructError
from uni_instruct.system.files import atomic_folder_if_absent, cache_folder, sha256

# The address that means: start a new Ray on this machine.
LOCAL = "local"
_CONNECT_S = 10.0
# Attempts to start Ray. Its own timeout is 30 s, which a busy machine may exceed once.
_START_ATTEMPTS = 3
_QUIET = {"logging_level": logging.ERROR, "log_to_driver": False}
# A copy of a file or folder: a name with the hash of its content, and the files' bytes by relative path ('' for a single file).
PackedFiles = tuple[str, dict[str, bytes]]


def import_ray() -> ModuleType:
    """Import Ray, with its usage statistics off. Raises MissingExtraError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray 2.60 warns for actors without a GPU
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise MissingExtraError("ray", extra="ray") from error


def import_ray_serve() -> ModuleType:
    """Import Ray Serve. Raises MissingExtraError if it or one of its dependencies is not installed."""
    import_ray()
    try:
        return importlib.import_module("ray.serve")
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "ray.serve", extra="ray-serve") from error


def connect(ray: ModuleType, address: str, count: int | None) -> bool:
    """Connect this process to Ray; return whether the caller must close the connection (False if one was open already).

    address: LOCAL, 'auto', HOST:PORT or ray://HOST:PORT. count: CPUs of a local Ray; by default all that this process may use.

    Raises RequestError if there is no such cluster or its version differs, UniInstructError if a local Ray does not start.
    """
    if ray.is_initialized():
        return False
    if address == LOCAL:
        _start_local(ray, count or usable_cpus())
        return True
    _check_listens(address)
    try:
        ray.init(address=address, **_QUIET)
    except Exception as error:  # Ray raises RuntimeError, ConnectionError, ValueError, or gRPC's own
        reason = " ".join(str(error).split())
        if "ersion mismatch" in reason:
            raise RequestError(
                f"the Ray cluster at {address} has another version: {reason[:300]}",
                remedy=f"install the cluster's versions of ray and Python on this machine, which has ray {ray.__version__}",
                param="ray",
            ) from error
        raise _no_cluster(address, reason[:200]) from error
    return True


def _start_local(ray: ModuleType, cpus: int) -> None:
    for left in reversed(range(_START_ATTEMPTS)):
        try:
            ray.init(address="local", include_dashboard=False, num_cpus=cpus, **_QUIET)
            return
        except Exception as error:  # Ray has no error class of its own for this
            ray.shutdown()
            if not left:
                reason = " ".join(str(error).split())[:300]
                raise UniInstructError(f"Ray does not start: {reason}", remedy="use --workers in place of --ray") from error


def _check_listens(address: str) -> None:
    """Raise RequestError if nothing listens at the address. Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        if address != "auto" and not address.startswith("ray://"):
            raise _no_cluster(address, "that is not HOST:PORT")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, reason: str) -> RequestError:
    return RequestError(
        f"there is no Ray cluster at {address}: {reason}",
        remedy="give its HOST:PORT, or --ray alone for this machine; 'ray start --head' starts one",
        param="ray",
    )


def check_version(version: str) -> None:
    """Raise RequestError if this node's uni-instruct differs from `version`, the caller's. Runs on the cluster's nodes."""
    if version != __version__:
        raise RequestError(
            f"a node of the cluster has uni-instruct {__version__}, but this machine has {version}",
            remedy=f"pip install 'uni-instruct[ray]=={version}' on all nodes",
        )


def contents(path: Path) -> PackedFiles:
    """The file or folder at `path` as PackedFiles: '<first 32 digits of its hash>/<its name>', and its files' bytes."""
    files = {"": path} if path.is_file() else {str(f.relative_to(path)): f for f in sorted(path.rglob("*")) if f.is_file()}
    digest = hashlib.sha256()
    for name, file in files.items():
        digest.update(f"{name}\0{sha256(file)}\n".encode())
    return f"{digest.hexdigest()[:32]}/{path.name}", {name: file.read_bytes() for name, file in files.items()}


def unpack_files(sent: PackedFiles) -> Path:
    """The path of the files on this node. The first actor that needs them writes them to the cache; others reuse them."""
    name, files = sent
    place = cache_folder() / "ray" / name
    if not place.exists():
        # Several actors of a node may write at once. When the second is done, the first may be reading its files already, so
        # an existing folder is never replaced.
        with atomic_folder_if_absent(place.parent) as partial:
            for part, content in files.items():
                file = partial / place.name / part if part else partial / place.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
    return place
