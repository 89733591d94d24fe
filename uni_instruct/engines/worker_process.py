"""Run a step of an engine's preparation (a trial, a compilation, a build) in a process of its own, with progress calls."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from uni_instruct.system.processes import die_with_parent

PROGRESS_INTERVAL_S = 10


def run_worker(
    module: str,
    arguments: Sequence[str],
    on_progress: Callable[[float], None],
    *,
    timeout_s: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str] | None:
    """Run `python -m module arguments` to its end; returns None if it was stopped after timeout_s.

    on_progress is called every ten seconds with the seconds so far. environment: variables to add to those of this process.
    The child is killed however this process ends. A module that starts processes itself must call `die_with_group`.
    """
    # -P: a file in the current folder must not shadow a module.
    command = [sys.executable, "-P", "-m", module, *arguments]
    variables, start = {**os.environ, **(environment or {})}, time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A process group of its own, so that processes that the child has started are killed with it.
    ends = {"process_group": 0, "preexec_fn": die_with_parent(os.getpid())}
    with subprocess.Popen(command, env=variables, text=True, **pipes, **ends) as process:  # type: ignore[call-overload]
        try:
            while timeout_s is None or time.monotonic() - start < timeout_s:
                left_s = PROGRESS_INTERVAL_S if timeout_s is None else timeout_s - (time.monotonic() - start)
                with suppress(subprocess.TimeoutExpired):
                    output, errors = process.communicate(timeout=max(0.0, min(PROGRESS_INTERVAL_S, left_s)))
                    return subprocess.CompletedProcess(command, process.returncode, output, errors)
                on_progress(time.monotonic() - start)
        finally:
            if process.returncode is None:
                with suppress(OSError):  # it has just ended by itself
                    os.killpg(process.pid, signal.SIGKILL)
    return None
