"""float32 that is float32 on GPUs too."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# The setting is the process's, so blocks of several threads count as one: who leaves last puts back what the first one found.
_lock = threading.Lock()
_inside = 0
_before: list[str] = []


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the block, GPUs multiply and convolve float32 in all of its 24 bits; afterwards the settings are what they were.

    By default cuDNN's convolutions take TF32 where a GPU has it, which keeps 11 bits of each factor. Needs torch. Blocks may
    overlap in any way, in one thread or in several.
    """
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _inside, _before
    with _lock:
        if not _inside:
            _before = _exchange(["ieee"] * 2)
        _inside += 1


def _leave() -> None:
    global _inside
    with _lock:
        _inside -= 1
        if not _inside:
            _exchange(_before)


def _exchange(precisions: list[str]) -> list[str]:
    """Sets what cuDNN's convolutions and cuBLAS round float32 to; returns what it was."""
    import torch

    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting, precision in zip(settings, precisions, strict=True):
        setting.fp32_precision = precision
    return before
