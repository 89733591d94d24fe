"""NVIDIA's GPUs through the driver itself: which there are, their memory, a stream. Needs neither torch nor CUDA's toolkit.

The driver's library is there wherever a GPU can be used, its calls are stable, and 25 of them are all that an engine needs;
every package that wraps them is tied to a version of CUDA.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from functools import cache
from typing import NamedTuple

import numpy as np

from uni_instruct.errors import UniInstructError

LIBRARY = "libcuda.so.1"
# cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR; a stream that does not wait for the default one; a capture
# that other threads' calls do not break.
_MAJOR, _MINOR = 75, 76
_NON_BLOCKING, _THREAD_LOCAL = 1, 1
_NAME_BYTES = 128
_HANDLE = POINTER(c_void_p)
# cuda.h's declarations: each returns a CUresult, 0 for success; CUdeviceptr has 64 bits, every handle is a pointer.
_ARGUMENTS = {
    "cuInit": (c_uint,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_HANDLE,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (_HANDLE, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (_HANDLE, c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _HANDLE),
    "cuGraphInstantiateWithFlags": (_HANDLE, c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}


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
        driver = _driver()
    except OSError:
        return ()
    count = c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(byref(count)):
        return ()  # no device, or a driver that does not answer: either way there is none to use
    return tuple(_gpu(index) for index in range(count.value))


class CudaStream:
    """A stream of one GPU, with memory on both sides, for one caller at a time. Raises UniInstructError where CUDA fails.

    Whoever calls anything but `close` is inside `current`, in whatever thread.
    """

    def __init__(self, index: int):
        self._device, self._context, stream = c_int(), c_void_p(), c_void_p()
        _call("cuInit", 0)
        _call("cuDeviceGet", byref(self._device), index)
        # The primary context is the one that CUDA's runtime, torch and TensorRT use.
        _call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self._memory: list[Callable[[], None]] = []
        with self.current():
            _call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        self.handle: int = stream.value or 0

    @contextmanager
    def current(self) -> Iterator[None]:
        """Within the block, this thread's CUDA calls go to the GPU; afterwards to where they went before."""
        _call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def device_buffer(self, size: int) -> int:
        """The address of so many bytes on the GPU."""
        address = c_uint64()
        _call("cuMemAlloc_v2", byref(address), size)
        self._memory.append(lambda: _call("cuMemFree_v2", address))
        return address.value

    def host_buffer(self, size: int) -> np.ndarray:
        """So many bytes of this machine's memory that the GPU can read by itself: uint8 [size], until `close`."""
        address = c_void_p()
        _call("cuMemHostAlloc", byref(address), size, 0)
        self._memory.append(lambda: _call("cuMemFreeHost", address))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address.value or 0))

    def upload(self, address: int, source: np.ndarray) -> None:
        """Begins to copy a contiguous array to the GPU."""
        _call("cuMemcpyHtoDAsync_v2", address, source.ctypes.data, source.nbytes, self.handle)

    def download(self, target: np.ndarray, address: int) -> None:
        """Begins to copy from the GPU into a contiguous array."""
        _call("cuMemcpyDtoHAsync_v2", target.ctypes.data, address, target.nbytes, self.handle)

    def synchronize(self) -> None:
        """Waits for all that was begun."""
        _call("cuStreamSynchronize", self.handle)

    def capture(self, enqueue: Callable[[], None]) -> int:
        """What enqueue puts on the stream as one CUDA graph, for `launch`. Nothing of it runs yet."""
        graph, executable = c_void_p(), c_void_p()
        _call("cuStreamBeginCapture_v2", self.handle, _THREAD_LOCAL)
        try:
            enqueue()
        finally:
            _call("cuStreamEndCapture", self.handle, byref(graph))
        _call("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        _call("cuGraphDestroy", graph)
        self._memory.append(lambda: _call("cuGraphExecDestroy", executable))
        return executable.value or 0

    def launch(self, graph: int) -> None:
        """Begins to run what was captured."""
        _call("cuGraphLaunch", graph, self.handle)

    def close(self) -> None:
        """Frees all memory and graphs, once what runs is done."""
        with self.current():
            self.synchronize()
            while self._memory:
                self._memory.pop()()
            _call("cuStreamDestroy_v2", self.handle)
        _call("cuDevicePrimaryCtxRelease_v2", self._device)


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL(LIBRARY)
    for name, arguments in _ARGUMENTS.items():
        function = getattr(driver, name)
        function.argtypes, function.restype = arguments, c_int
    return driver


def _call(name: str, *arguments: object) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = c_char_p()
        _driver().cuGetErrorString(code, byref(text))
        raise UniInstructError(
            f"{name} of CUDA's driver failed: {(text.value or b'unknown error').decode()} ({code})",
            remedy="nvidia-smi shows the GPU's state and memory; without room there, take a smaller model or another device",
        )


def _gpu(index: int) -> Gpu:
    device, major, minor = c_int(), c_int(), c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _call("cuDeviceGet", byref(device), index)
    _call("cuDeviceGetName", name, _NAME_BYTES, device)
    _call("cuDeviceGetAttribute", byref(major), _MAJOR, device)
    _call("cuDeviceGetAttribute", byref(minor), _MINOR, device)
    return Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value)
