"""NVIDIA's GPUs, their memory and streams, through the driver's own API. Needs neither torch nor the CUDA toolkit.

The driver's library exists wherever a GPU can be used, and its API is stable. An engine needs only 25 of its functions. The
packages that wrap them are each tied to a version of CUDA.
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
# cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76
# cuda.h: CU_STREAM_NON_BLOCKING, a stream that does not wait for the default stream; CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, a
# capture that calls of other threads do not invalidate.
_NON_BLOCKING, _THREAD_LOCAL = 1, 1
_NAME_BYTES = 128
_HANDLE = POINTER(c_void_p)
# The declarations in cuda.h. Each function returns a CUresult, 0 for success. A CUdeviceptr has 64 bits, a handle is a pointer.
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
    """A GPU's name and its compute capability times ten, as 89 for 8.9."""

    name: str
    sm: int


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order; empty without the driver.

    CUDA does not survive a fork. A process that has called this must spawn, not fork, a child that is to use a GPU.
    """
    try:
        driver = _driver()
    except OSError:
        return ()
    count = c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(byref(count)):
        return ()  # no device, or a driver that does not work: no GPU can be used
    return tuple(_gpu(index) for index in range(count.value))


class CudaStream:
    """A stream of one GPU, with buffers on the GPU and on the host. Raises UniInstructError if a CUDA call fails.

    Not thread-safe: one caller at a time, from any thread. All methods but `close` must be called within `current`.
    """

    def __init__(self, index: int):
        self._device, self._context, stream = c_int(), c_void_p(), c_void_p()
        _call("cuInit", 0)
        _call("cuDeviceGet", byref(self._device), index)
        # The primary context, as the CUDA runtime, torch and TensorRT share it.
        _call("cuDevicePrimaryCtxRetain", byref(self._context), self._device)
        self._memory: list[Callable[[], None]] = []
        with self.current():
            _call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        self.handle: int = stream.value or 0

    @contextmanager
    def current(self) -> Iterator[None]:
        """Within the block, CUDA calls of this thread go to this GPU; afterwards, to where they went before."""
        _call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def device_buffer(self, size: int) -> int:
        """Allocate `size` bytes on the GPU, until `close`. Returns the address."""
        address = c_uint64()
        _call("cuMemAlloc_v2", byref(address), size)
        self._memory.append(lambda: _call("cuMemFree_v2", address))
        return address.value

    def host_buffer(self, size: int) -> np.ndarray:
        """Allocate `size` bytes of pinned host memory, which the GPU can access by itself, until `close`: uint8 [size]."""
        address = c_void_p()
        _call("cuMemHostAlloc", byref(address), size, 0)
        self._memory.append(lambda: _call("cuMemFreeHost", address))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address.value or 0))

    def upload(self, address: int, source: np.ndarray) -> None:
        """Start to copy a contiguous array to the GPU, without waiting for the end."""
        _call("cuMemcpyHtoDAsync_v2", address, source.ctypes.data, source.nbytes, self.handle)

    def download(self, target: np.ndarray, address: int) -> None:
        """Start to copy from the GPU into a contiguous array, without waiting for the end."""
        _call("cuMemcpyDtoHAsync_v2", target.ctypes.data, address, target.nbytes, self.handle)

    def synchronize(self) -> None:
        """Wait until everything on the stream has finished."""
        _call("cuStreamSynchronize", self.handle)

    def capture(self, enqueue: Callable[[], None]) -> int:
        """Capture what `enqueue` puts on the stream as a CUDA graph, without running it. Returns a handle for `launch`."""
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
        """Start to run a captured graph, without waiting for the end."""
        _call("cuGraphLaunch", graph, self.handle)

    def close(self) -> None:
        """Wait for what runs, then free all memory and graphs."""
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
            f"the CUDA driver call {name} failed: {(text.value or b'unknown error').decode()} ({code})",
            remedy="check the GPU with nvidia-smi; if its memory is full, use a smaller model or another device",
        )


def _gpu(index: int) -> Gpu:
    device, major, minor = c_int(), c_int(), c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    _call("cuDeviceGet", byref(device), index)
    _call("cuDeviceGetName", name, _NAME_BYTES, device)
    _call("cuDeviceGetAttribute", byref(major), _MAJOR, device)
    _call("cuDeviceGetAttribute", byref(minor), _MINOR, device)
    return Gpu(name.value.decode(errors="replace"), 10 * major.value + minor.value)
