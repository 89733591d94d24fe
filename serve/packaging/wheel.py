"""This package as a wheel: built from the checkout that it runs from, or repacked from the files that pip installed."""

import base64
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import Distribution, PackagePath, distribution
from importlib.util import find_spec
from pathlib import Path

from uni_instruct.errors import RequestError, UniInstructError

_SOURCES = ("uni_instruct", "train", "export", "serve", "pyproject.toml", "README.md", "LICENSE")
# Files in .dist-info that pip writes about one installation. RECORD is written again for the new wheel.
_NOT_PACKED = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
_log = logging.getLogger(__name__)


def make_wheel(folder: Path) -> Path:
    """Write the wheel of this package, including the generators that ship with it, into `folder`. Needs no network.

    Raises RequestError if it can be neither built nor repacked, UniInstructError if the build fails.
    """
    checkout = Path(__file__).resolve().parents[2]
    if all((checkout / name).exists() for name in _SOURCES):
        return _built(checkout, folder)
    return _repacked(distribution("uni-instruct"), folder)


def _built(checkout: Path, folder: Path) -> Path:
    missing = [package for package in ("pip", "setuptools", "wheel") if find_spec(package) is None]
    if missing:
        names = " ".join(missing)
        raise RequestError(
            f"the wheel cannot be built: {names} cannot be imported", remedy=f"install {names} beside uni-instruct"
        )
    # Build in a copy, because setuptools leaves its own folders (build/, *.egg-info) in the sources.
    with tempfile.TemporaryDirectory(prefix="uni-instruct-wheel-") as copy:
        for name in _SOURCES:
            source = checkout / name
            if source.is_dir():
                shutil.copytree(source, Path(copy) / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, Path(copy) / name)
        offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
        command = [sys.executable, "-P", "-m", "pip", "wheel", *offline, "--wheel-dir", str(folder), copy]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=copy)
    if done.returncode:
        _log.error("%s", done.stderr.strip())
        raise UniInstructError(f"pip wheel ended with exit code {done.returncode}", remedy="the log above says why")
    (wheel,) = folder.glob("*.whl")
    return wheel


def _repacked(installed: Distribution, folder: Path) -> Path:
    """Zip the installed files into a wheel, with a new RECORD of their hashes. Pip's RECORD says which files these are."""
    files = [file for file in installed.files or [] if _is_packed(file)]
    info = next((file.parts[0] for file in files if file.name == "WHEEL" and file.parts[0].endswith(".dist-info")), None)
    if info is None:
        raise RequestError(
            f"the installation of uni-instruct {installed.version} has no list of its files (RECORD)",
            remedy="install it with pip from its wheel, or run this from a checkout",
        )
    path = folder / f"{info.removesuffix('.dist-info')}-py3-none-any.whl"
    lines = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            content = Path(str(installed.locate_file(file))).read_bytes()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            lines.append(f"{file.as_posix()},sha256={digest},{len(content)}\n")
            archive.writestr(file.as_posix(), content)
        archive.writestr(f"{info}/RECORD", "".join(lines) + f"{info}/RECORD,,\n")
    return path


def _is_packed(file: PackagePath) -> bool:
    # Console scripts are outside site-packages ('..' in their paths). Pip generates them again from entry_points.txt.
    return (
        ".." not in file.parts
        and file.suffix != ".pyc"
        and not (file.parts[0].endswith(".dist-info") and file.name in _NOT_PACKED)
    )
