"""Reads checkpoints in a process of its own that may not use much memory and writes down whatever leaves the ordinary.

`Worker` is the tests' end. The other end is this file run as a program: every line of its input is a path, every line of its
output what came of it. An audit hook sees each import, compilation, execution, process, socket and file that reading causes;
none is expected but opening the file itself, so anything else that Python audits counts.
"""

import json
import os
import resource
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 2 << 30  # of addresses, most of it libraries
PATIENCE_S = 60
HARMLESS = frozenset({"builtins.id"})


@dataclass(frozen=True)
class Outcome:
    """error: the class of the exception, '' for none. events: what was audited. peak_mb: how much memory reading added."""

    error: str
    message: str
    format: str
    events: list[str]
    peak_mb: float
    is_ours: bool


class Worker:
    """A process that reads files. unsafe: with the ordinary unpickler, to see that the alarm rings."""

    def __init__(self, unsafe: bool = False):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, __file__, *(["unsafe"] * unsafe)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0)
        self._ask("")  # until it is ready

    def read(self, path: Path) -> Outcome:
        """What came of a file. Fails the test where the process hangs or dies."""
        return Outcome(**json.loads(self._ask(str(path))))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, line: str) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line.encode() + b"\n")
        answer, deadline = b"", time.monotonic() + PATIENCE_S
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            part = self._process.stdout.read(1 << 16) if ready else b""
            if not part:
                state = f"died ({self._process.wait(5)})" if ready else f"hangs for more than {PATIENCE_S} s"
                self.close()
                raise AssertionError(f"the process that reads {line} {state}")
            answer += part
        return answer


def _serve(unsafe: bool) -> None:
    import copyreg
    import pickle

    import numpy as np
    import safetensors

    from uni_instruct.checkpoints.checkpoint import read_checkpoint
    from uni_instruct.errors import UniInstructError

    assert safetensors
    # Whatever a first use imports: encodings, and what error messages need.
    b"a".decode("cp437"), np.array([1.0]).tolist()
    copyreg.add_extension("os", "system", 240)  # so that extension codes have something to call
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    events: list[str] = []
    armed: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not armed or event in HARMLESS:
            return
        if event == "open" and arguments[1] in ("r", "rb") and str(arguments[0]) in armed:
            return
        events.append(f"{event} {arguments!r}"[:200])

    sys.addaudithook(hook)

    def attempt(path: str) -> dict[str, Any]:
        events.clear()
        error: BaseException | None = None
        found = ""
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
        before = _peak_mb()
        armed.extend([path, str(Path(path).with_name("config.json"))])
        try:
            if unsafe:
                pickle.loads(Path(path).read_bytes())
            else:
                found = read_checkpoint(path).format
        except BaseException as caught:
            error = caught
        armed.clear()
        return {
            "error": type(error).__name__ if error else "",
            "message": str(error) if error else "",
            "format": found,
            "events": list(events),
            "peak_mb": _peak_mb() - before,
            "is_ours": isinstance(error, UniInstructError),
        }

    for line in sys.stdin:
        path = line.rstrip("\n")
        print(json.dumps(attempt(path)) if path else "ready", flush=True)


def _peak_mb() -> float:
    """The largest resident set since it was last reset; getrusage would tell that of the process that started this one."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    _serve("unsafe" in sys.argv)
