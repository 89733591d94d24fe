"""Full float32 precision on GPUs, without TF32."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

# torch has one setting for the whole process. So the blocks of all threads are counted: the first block to begin saves the
# setting, the last one to end restores it.
_lock = threading.Lock()
_inside = 0
_before: list[str] = []


@contextmanager
def full_float32() -> Iterator[None]:
    """Make GPUs compute float32 products and convolutions with all 24 bits of precision within the block.

    By default cuDNN convolves in TF32 on GPUs that have it, which keeps 11 bits of each factor. The settings are restored when
    the last block ends. Blocks may nest and overlap, in one thread or in several. Needs torch.
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
    """Set the float32 precision of cuDNN's convolutions and cuBLAS; return the previous settings."""
    import torch

    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting, precision in zip(settings, precisions, strict=True):
        setting.fp32_precision = precision
    return before
