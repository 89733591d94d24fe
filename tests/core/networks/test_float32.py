"""The setting is the process's: blocks that overlap in several threads leave it as the first one found it."""

import threading

import torch

from uni_instruct.networks.float32 import full_float32


def settings() -> tuple[str, ...]:
    parts = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    return tuple(part.fp32_precision for part in parts)


def test_blocks_that_overlap_leave_the_setting_as_it_was() -> None:
    """A enters, B enters, A leaves, B leaves: each putting back what it found would leave A's setting for ever."""
    before, entered, left = settings(), threading.Event(), threading.Event()
    assert before != ("ieee",) * 2
    seen = []

    def second() -> None:
        with full_float32():
            entered.set()
            left.wait(10)
            seen.append(settings())

    thread = threading.Thread(target=second)
    with full_float32():
        thread.start()
        entered.wait(10)
    left.set()
    thread.join(10)
    assert seen == [("ieee",) * 2]
    assert settings() == before


def test_the_older_switch_can_be_read_afterwards() -> None:
    """`torch.export` reads it, and fails where convolutions and recurrent layers are left apart."""
    before = torch.backends.cudnn.allow_tf32
    with full_float32(), full_float32():
        pass
    assert torch.backends.cudnn.allow_tf32 is before
