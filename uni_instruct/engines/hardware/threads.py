"""How an engine's threads use the CPUs: the one place that says it, for every runtime.

A runtime's threads wait for each other after every layer. Threads that spin meanwhile answer at once and keep their cores;
threads that sleep leave them to others. Which is faster depends on who else wants the cores (docs/engines.md, "Threads").
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from uni_instruct.processes import sleep_while_waiting

QUOTA = Path("/sys/fs/cgroup/cpu.max")
# Linux: its fourth word is 'threads that want a core now / all threads'.
LOAD = Path("/proc/loadavg")


@dataclass(frozen=True, kw_only=True)
class Threads:
    """count threads. spin: they keep their cores while they wait. pin: each is bound to a core of its own.

    Pinning is off everywhere: the worker processes of a server would all bind theirs to the same first cores, and a busy
    neighbour on one of them then delays every layer.
    """

    count: int
    spin: bool
    pin: bool = False

    @classmethod
    def here(cls, spin: bool) -> "Threads":
        """On the CPUs that this process may use. spin is the caller's word: it may spin.

        It does where the machine has a core to spare for each thread: spinning gains up to 1.6 times there, and on cores that
        others want it was seven times as slow.
        """
        count = usable_cpus()
        return cls(count=count, spin=spin and wanting_cpus() + count <= (os.cpu_count() or 1))

    def for_onnxruntime(self) -> dict[str, str]:
        """Entries of its session's configuration; the number of threads is an option of its own."""
        entries = {"session.intra_op.allow_spinning": str(int(self.spin))}
        if self.pin and self.count > 1:
            # The first thread is the caller's; ONNX Runtime counts processors from 1.
            cpus = sorted(os.sched_getaffinity(0))
            places = (str(cpus[number % len(cpus)] + 1) for number in range(1, self.count))
            entries["session.intra_op_thread_affinities"] = ";".join(places)
        return entries

    def for_openvino(self, streams: int) -> dict[str, int | bool]:
        """Its settings. OpenVINO's threads (TBB's) sleep when they have waited a moment, whatever is asked for."""
        return {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": self.count, "ENABLE_CPU_PINNING": self.pin}

    def before_torch(self) -> None:
        """To be called before torch is first imported: OpenMP reads then, and once, whether its threads spin."""
        if not self.spin:
            sleep_while_waiting()

    def for_torch(self) -> None:
        """Lowers torch's number of threads to count, which a container's quota may ask for; never raises what was set."""
        import torch

        if torch.get_num_threads() > self.count:
            torch.set_num_threads(self.count)


def wanting_cpus() -> int:
    """How many threads of this machine, but the one that asks, want a core at this moment; 0 where nobody says."""
    try:
        return max(0, int(LOAD.read_text().split()[3].partition("/")[0]) - 1)
    except (OSError, IndexError, ValueError):
        return 0


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


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Within the block torch computes in one thread: the same bits on every machine, and none that waits for a busy core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
