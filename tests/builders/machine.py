"""This machine: the command line as a process, Debian's packages, a disk that is full."""

import io
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from uni_instruct.cli import main


def require_debian(path: str, package: str) -> Path:
    """The file of a Debian package; where it is missing the test skips, in CI it fails."""
    if not Path(path).exists():
        message = f"needs the Debian package {package}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return Path(path)


def run_cli(*arguments: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """The command line as a user calls it: a process of its own."""
    command = [sys.executable, "-m", "uni_instruct", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, **kwargs)


def call_cli(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in this process, which saves seconds of imports: for fixtures, and where no process is the point."""
    output, errors = io.StringIO(), io.StringIO()
    command, before = ["uni-instruct", *map(str, arguments)], sys.argv
    code: Any = 0
    try:
        sys.argv = command
        with redirect_stdout(output), redirect_stderr(errors):
            main()
    except SystemExit as error:
        code = error.code
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(command, int(code or 0), output.getvalue(), errors.getvalue())


@contextmanager
def files_of_at_most(limit_bytes: int) -> Iterator[None]:
    """The kernel refuses to write more than this to any file (errno EFBIG), here as a full disk does elsewhere."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
