"""Processes that work for an engine end with the process that waits for them, however that one ends."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from uni_instruct.bundle import Bundle

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's way to tell children")
# Longer than any of this takes: where nothing ends by itself, the test shall.
LIMIT_S = 300
WAITS = """
from uni_instruct.engines.worker_process import run_worker
run_worker("http.server", ["0", "--bind", "127.0.0.1"], print)
"""
COMPILES = """
import sys
from uni_instruct.engine import open_engine
open_engine(sys.argv[1], "torch-fp32-compiled")
"""
# A compiler that is at work for as long as anybody waits, with a process of its own, as g++ has cc1plus.
COMPILER = """#!/bin/sh
sleep 1000
exit 1
"""


def killed(script: str, *arguments: str, awaited: str) -> list[psutil.Process]:
    """What a process had started that was killed as soon as something of that name worked below it."""
    with subprocess.Popen([sys.executable, "-P", "-c", script, *arguments]) as process:
        below: list[psutil.Process] = []
        try:
            deadline = time.monotonic() + LIMIT_S
            while not any(awaited in " ".join(child.cmdline()) for child in below if child.is_running()):
                assert process.poll() is None, "it ended by itself"
                assert time.monotonic() < deadline
                time.sleep(0.1)
                below = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGKILL)
        return below


def test_a_worker_ends_with_a_process_that_was_killed() -> None:
    below = killed(WAITS, awaited="http.server")
    assert psutil.wait_procs(below, timeout=LIMIT_S)[1] == []


@pytest.mark.slow
def test_a_compiler_ends_with_a_process_that_was_killed(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "slow-g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    below = killed(COMPILES, str(tiny_bundle.path), awaited="sleep 1000")
    assert len(below) >= 3  # who compiles, the compiler, and what that has started
    assert psutil.wait_procs(below, timeout=LIMIT_S)[1] == []
