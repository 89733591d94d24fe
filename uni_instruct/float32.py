"""float32 that is float32 on GPUs too."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def full_float32() -> Iterator[None]:
    """Within the block, GPUs multiply and convolve float32 in all of its 24 bits; afterwards the settings are what they were.

    By default cuDNN's convolutions take TF32 where a GPU has it, which keeps 11 bits of each factor. Needs torch.
    """
    import torch

    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
