"""How an engine's threads use the CPUs: their number, and whether they spin or sleep. The one place for all runtimes.

A runtime's threads wait for each other after every layer. Threads that spin continue at once but keep their cores busy; threads
that sleep free their cores. Which is faster depends on what else needs the cores (docs/engines.md, "Threads").
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uni_instruct.system.processes import sleep_while_waiting

QUOTA = Path("/sys/fs/cgroup/cpu.max")
# Linux's load: the fourth word is 'threads that run or wait for a core / all threads'.
LOAD = Path("/proc/loadavg")


@dataclass(frozen=True, kw_only=True)
class Threads:
    """Settings for `count` threads. spin: they keep their cores while they wait. pin: each is bound to a core of its own.

    Pinning is off by default, and no engine turns it on: all worker processes of a server would bind their threads to the same
    first cores, and another process that keeps one of these cores busy would delay every layer.
    """

    count: int
    spin: bool
    pin: bool = False

    @classmethod
    def here(cls, spin: bool) -> "Threads":
        """Settings for this process at this moment: a thread per CPU that it may use. spin: whether the threads may spin.

        They do so only if the machine has an idle core for each: then it is up to 1.6 times as fast as sleeping. On cores that
        other processes need, spinning was seven times as slow.
        """
        count = usable_cpus()
        return cls(count=count, spin=spin and runnable_threads() + count <= (os.cpu_count() or 1))

    def for_onnxruntime(self) -> dict[str, str]:
        """Entries for ONNX Runtime's session configuration. `count` is not among them, as it is an option of its own."""
        entries = {"session.intra_op.allow_spinning": str(int(self.spin))}
        if self.pin and self.count > 1:
            # The first thread is the caller's, so it needs no entry. ONNX Runtime numbers processors from 1.
            cpus = sorted(os.sched_getaffinity(0))
            places = (str(cpus[number % len(cpus)] + 1) for number in range(1, self.count))
            entries["session.intra_op_thread_affinities"] = ";".join(places)
        return entries

    def for_openvino(self, streams: int) -> dict[str, int | bool]:
        """OpenVINO's settings. spin is not among them: its threads (TBB's) always sleep after a short wait."""
        return {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": self.count, "ENABLE_CPU_PINNING": self.pin}

    def before_torch(self) -> None:
        """Must be called before torch is first imported, as OpenMP then reads, only once, whether its threads spin."""
        if not self.spin:
            sleep_while_waiting()

    def for_torch(self) -> None:
        """Lower torch's number of threads to `count`, which respects a container's quota. Never raises it."""
        import torch

        if torch.get_num_threads() > self.count:
            torch.set_num_threads(self.count)


def runnable_threads() -> int:
    """How many other threads on this machine run or wait for a core at this moment; 0 if the system does not tell."""
    try:
        return max(0, int(LOAD.read_text().split()[3].partition("/")[0]) - 1)
    except (OSError, IndexError, ValueError):
        return 0


def usable_cpus() -> int:
    """How many CPUs this process may use: its affinity, limited by OMP_NUM_THREADS and by a container's CPU quota."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal():
        limits.append(int(wanted))
    if QUOTA.is_file():
        allowed, _, period = QUOTA.read_text().partition(" ")
        if allowed.isdecimal():
            limits.append(-(-int(allowed) // int(period)))  # microseconds of CPU per period, rounded up to CPUs
    return max(1, min(limits))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Within the block, torch computes in one thread. Needs torch.

    So the bits of a result do not depend on the number of CPUs, and no thread waits for another on a busy core.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
