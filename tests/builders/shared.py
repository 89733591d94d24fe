"""What is made once for all the processes of a test run."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of that name, made by whichever process asks first; the others wait for it. Read only."""
    root = factory.getbasetemp()
    # With several processes each has a folder of its own in the run's.
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = folder.with_name(f"{name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of one that failed
            make(partial)
            partial.rename(folder)
    return folder
