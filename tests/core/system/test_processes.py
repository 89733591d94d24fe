"""Freed memory goes back to the system where that was asked for."""

import subprocess
import sys

import pytest

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
