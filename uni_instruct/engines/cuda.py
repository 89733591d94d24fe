"""The GPUs that this process sees, through NVIDIA's driver. Needs neither torch nor CUDA's toolkit."""

import ctypes
from functools import cache
from typing import NamedTuple

# What the driver's library is called; it comes with the driver alone.
LIBRARY = "libcuda.so.1"
# cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76
_NAME_BYTES = 128


class Gpu(NamedTuple):
    """A GPU's name, and its compute capability times ten: 89 for 8.9."""

    name: str
    sm: int


@cache
def gpus() -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in CUDA's order; none without the driver.

    A process that has asked must not fork and use a GPU in its child: start the child anew.
    """
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()  # no device, or a driver that does not answer: either way there is none to use
    return tuple(_gpu(driver, index) for index in range(count.value))


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, _NAME_BYTES, device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value)
