"""How a process of ours behaves on a machine that it shares, and which of several processes speaks to the user."""

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# glibc's malloc.h: parameters of mallopt.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
_LARGE_BLOCK = 2**20
_TOP_PAD = 64 * 2**20
# Linux's prctl.h.
_PR_SET_PDEATHSIG = 1


def is_nonzero_rank() -> bool:
    """Whether this is one of the processes that work for the first."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) > 0


def sleep_while_waiting() -> None:
    """Lets OpenMP's threads sleep while they wait for each other, unless the environment says otherwise.

    Must come before torch is imported. Spinning threads cost nothing on an idle machine; where another process holds a core,
    a step of training takes four to a thousand times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_freed_memory() -> None:
    """Has glibc keep memory that was freed, for a process that allocates the same sizes over and over.

    By default every large tensor is mapped, zeroed page by page and unmapped again, which took a fifth of a training step.
    Elsewhere than on Linux with glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, _TOP_PAD)
    mallopt(_M_ARENA_MAX, 1)  # other arenas end at 64 MB and would map again


def release_large_blocks() -> None:
    """Has glibc give every block of a MiB and more back to the system as soon as it is freed, for a process that lives shortly.

    By default such blocks are kept once the first one was freed, and what is small and stays lies between them.
    Elsewhere than on Linux with glibc this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        mallopt(_M_ARENA_MAX, 1)


def release_freed_memory() -> None:
    """Has glibc hand freed memory back to the system, which it keeps where something still in use lies above it.

    For what comes between two large steps. Elsewhere than on Linux with glibc this does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        gc.collect()
        trim(0)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within the block SIGTERM, which schedulers send, ends it as Ctrl-C does: with what it has half written removed.

    In another thread than the first, which signals do not reach, this does nothing.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def die_with_parent(parent: int) -> Callable[[], None]:
    """What a child process calls first, so that it gets SIGTERM when its parent, whose id is given, ends in whatever way.

    Linux tells nobody of the death of a process that was killed, unless asked to. Elsewhere this does nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None

    def ask() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
            if os.getppid() != parent:  # it has ended already
                os.kill(os.getpid(), signal.SIGTERM)

    return ask


def die_with_group() -> None:
    """From now on SIGTERM ends this process with all others of its group, where it leads one: with all that it has started."""
    if os.getpgrp() == os.getpid():
        signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
