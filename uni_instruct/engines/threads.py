"""How many threads a runtime is given."""

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cpus() -> int:
    """The CPUs this process may run on; fewer where OMP_NUM_THREADS or a container's quota says so."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal():
        limits.append(int(wanted))
    if QUOTA.is_file():
        allowed, _, period = QUOTA.read_text().partition(" ")
        if allowed.isdecimal():
            limits.append(-(-int(allowed) // int(period)))
    return max(1, min(limits))
