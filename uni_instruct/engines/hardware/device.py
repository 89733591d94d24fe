"""Names of devices: 'cpu', 'cuda' or 'cuda:1', checked against what this machine has. Needs no torch."""

import re

from uni_instruct.engines.hardware.cuda import gpus
from uni_instruct.errors import RequestError

CPU, CUDA = "cpu", "cuda"
_FORM = re.compile(r"cpu|cuda(?::(?P<index>[0-9]{1,3}))?")


def checked_device(text: str) -> str:
    """Normalise a device's name to 'cpu' or 'cuda:<index>'. Raises RequestError if it is unknown or there is no such GPU."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise RequestError(f"device '{text[:60]}' is unknown", remedy="use cpu, cuda or cuda:1", param="device")
    if text == CPU:
        return CPU
    index, count = int(match["index"] or 0), len(gpus())
    if not count:
        raise RequestError(
            f"device {text} was asked for, and this process sees no CUDA device",
            remedy="use --device cpu; with a GPU in the machine, check nvidia-smi and CUDA_VISIBLE_DEVICES",
            param="device",
        )
    if index >= count:
        there = " or ".join(f"cuda:{number}" for number in range(count))
        raise RequestError(
            f"device {text} was asked for, and this process sees only {count} CUDA device{'s' if count > 1 else ''}",
            remedy=f"use {there}",
            param="device",
        )
    return f"{CUDA}:{index}"


def device_type(device: str) -> str:
    """The kind of a device: 'cpu' or 'cuda'."""
    return device.partition(":")[0]


def device_index(device: str) -> int:
    """The index of a CUDA device among those that this process sees (CUDA_VISIBLE_DEVICES); 0 for 'cuda' and 'cpu'."""
    return int(device.partition(":")[2] or 0)
