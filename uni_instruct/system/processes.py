"""Settings of this process for a shared machine: waiting threads, freed memory, signals, and which rank prints."""

import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8
_LARGE_BLOCK = 2**20
_TOP_PAD = 64 * 2**20
# Linux's prctl.h: the option that sets the signal a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1


def is_nonzero_rank() -> bool:
    """Whether this is a distributed process other than rank 0, which alone prints."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) > 0


def sleep_while_waiting() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless OMP_WAIT_POLICY is set already.

    Call it before torch is imported. By default the threads spin, which costs nothing on an idle machine. If another process
    uses a core, spinning makes a training step take four to a thousand times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, for a process that allocates the same sizes over and over.

    By default every large tensor is mapped, zeroed page by page and unmapped again, which took a fifth of a training step.
    Does nothing unless on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_M_TOP_PAD, _TOP_PAD)
    mallopt(_M_ARENA_MAX, 1)  # other arenas have at most 64 MB, beyond which memory is mapped again


def release_large_blocks() -> None:
    """Make glibc return each block of at least 1 MiB to the system when it is freed, for a short-lived process.

    By default glibc raises this limit after the first free. Later large blocks are then kept, and small blocks that are still
    in use between them prevent their return. Does nothing unless on Linux with glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        mallopt(_M_ARENA_MAX, 1)


def release_freed_memory() -> None:
    """Make glibc return freed memory to the system, which it otherwise keeps if a block above it is still in use.

    Call it between two memory-intensive steps. Does nothing unless on Linux with glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        gc.collect()
        trim(0)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM, which schedulers send, into KeyboardInterrupt within the block, so that partly written files are removed.

    Does nothing outside the main thread, the only one in which Python handles signals.
    """
    received = False

    def interrupt(*_: object) -> None:
        nonlocal received
        received = True
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except Exception as error:
        # Libraries may turn the interrupt into an error of their own, such as ImportError if it came during an import.
        if received:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def die_with_parent(parent: int) -> Callable[[], None]:
    """A function for a child process to call first, so that it gets SIGTERM when its parent ends, even if that was killed.

    parent: the parent's process id. By default Linux does not notify children of their parent's end. Does nothing on other
    systems.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None

    def ask() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
            if os.getppid() != parent:  # the parent ended before the call above, so no signal will come
                os.kill(os.getpid(), signal.SIGTERM)

    return ask


def die_with_group() -> None:
    """Make SIGTERM kill the whole process group, with all child processes in it, if this process is the group's leader."""
    if os.getpgrp() == os.getpid():
        signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
