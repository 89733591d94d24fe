"""Processes that do one thing for an engine, try it or compile it, while whoever waits is told that they run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from uni_instruct.processes import die_with_parent

TELL_EVERY_S = 10


def run_worker(
    module: str,
    arguments: Sequence[str],
    tell: Callable[[float], None],
    *,
    timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str] | None:
    """`python -m module arguments` when it has ended, None where it was stopped after timeout_s.

    tell is called with the seconds so far, every ten of them. environment: variables beside those of this process.
    However this process ends, the other one ends with it; one that starts processes itself calls `die_with_group`.
    """
    # -P: not what lies in the current folder.
    command = [sys.executable, "-P", "-m", module, *arguments]
    variables, start = {**os.environ, **(environment or {})}, time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A group of its own: what it has started goes with it.
    ends = {"process_group": 0, "preexec_fn": die_with_parent(os.getpid())}
    with subprocess.Popen(command, env=variables, text=True, **pipes, **ends) as process:  # type: ignore[call-overload]
        try:
            while timeout_s is None or time.monotonic() - start < timeout_s:
                left_s = TELL_EVERY_S if timeout_s is None else timeout_s - (time.monotonic() - start)
                with suppress(subprocess.TimeoutExpired):
                    output, errors = process.communicate(timeout=max(0.0, min(TELL_EVERY_S, left_s)))
                    return subprocess.CompletedProcess(command, process.returncode, output, errors)
                tell(time.monotonic() - start)
        finally:
            if process.returncode is None:
                with suppress(OSError):  # it has ended meanwhile
                    os.killpg(process.pid, signal.SIGKILL)
    return None
