"""Freed memory goes back to the system when asked for; SIGTERM interrupts, whatever libraries make of it."""

import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from uni_instruct.system.processes import sigterm_as_interrupt

# Blocks of 4 MiB are freed while something small, allocated after each of them, stays.
_SCRIPT = """
import numpy as np
from pathlib import Path
from uni_instruct.system import processes

def resident_mb():
    return int(Path('/proc/self/statm').read_text().split()[1]) * 4096 / 1e6

processes.{ask}()
np.ones(2**22, np.uint8)  # once one was freed, glibc would keep the others
before, blocks, small = resident_mb(), [], []
for _ in range(32):
    blocks.append(np.ones(2**22, np.uint8))
    small.append(np.ones(2**15, np.uint8))
held = resident_mb()
del blocks
print(held - before, resident_mb() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's ways")
def test_large_blocks_are_given_back_when_they_are_freed() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", _SCRIPT.format(ask="release_large_blocks")], capture_output=True, text=True, check=True
    )
    held, left = map(float, done.stdout.split())
    assert held > 130
    assert left < 10


def test_sigterm_is_an_interrupt_even_if_a_library_raises_something_else() -> None:
    """An import that is interrupted may end in an ImportError, which would be reported as a missing package."""

    def missing(interrupted: bool) -> None:
        with suppress(KeyboardInterrupt), sigterm_as_interrupt():
            with suppress(KeyboardInterrupt):
                if interrupted:
                    signal.raise_signal(signal.SIGTERM)
            raise ModuleNotFoundError("sympy")

    before = signal.getsignal(signal.SIGTERM)
    missing(interrupted=True)
    with pytest.raises(ModuleNotFoundError):
        missing(interrupted=False)
    assert signal.getsignal(signal.SIGTERM) is before
