"""Runs a library that torch's inductor compiled ahead of time, through its C interface.

torch's own loader holds the GIL while the code runs, so a server's event loop would stop for as long as a batch takes. ctypes
releases the GIL. The declarations are those of torch/csrc/inductor/aoti_runtime/interface.h and aoti_torch/c/shim.h, which
torch keeps stable for libraries that were compiled earlier.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

# How many threads may run the code at a time; others wait. Each of them uses all cores.
_MAX_CONCURRENT_CALLS = 2
_FUNCTIONS: dict[str, list[object]] = {
    "AOTInductorModelContainerCreateWithDevice": [POINTER(c_void_p), c_size_t, c_char_p, c_char_p],
    "AOTInductorModelContainerDelete": [c_void_p],
    "AOTInductorModelContainerRun": [
        *[c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_void_p), c_size_t],
        *[c_void_p, c_void_p],
    ],
    "aoti_torch_create_tensor_from_blob": [
        *[c_void_p, c_int64, POINTER(c_int64), POINTER(c_int64), c_int64],
        *[c_int32, c_int32, c_int32, POINTER(c_void_p)],
    ],
    "aoti_torch_copy_": [c_void_p, c_void_p, c_int32],
    "aoti_torch_delete_tensor_object": [c_void_p],
    "aoti_torch_device_type_cpu": [],
    "aoti_torch_dtype_float32": [],
    "aoti_torch_dtype_int64": [],
}


class CompiledLibrary:
    """A compiled function from tensors to one float32 tensor, on the CPU. Safe to call from several threads.

    Raises OSError if this torch cannot load the file as a library, AttributeError if the library lacks a function, RuntimeError
    if the code fails.
    """

    def __init__(self, path: Path):
        self._container = c_void_p()
        # torch's functions (aoti_torch_...) are found through this handle too, as the library is linked to torch.
        self._library = ctypes.CDLL(str(path))
        for name, arguments in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_int32
        self._dtypes = {
            torch.float32: self._library.aoti_torch_dtype_float32(),
            torch.int64: self._library.aoti_torch_dtype_int64(),
        }
        create = self._library.AOTInductorModelContainerCreateWithDevice
        self._check(create(byref(self._container), _MAX_CONCURRENT_CALLS, b"cpu", None))

    def __call__(self, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Run the function on float32 or int64 tensors. Returns its result, of that shape, as a fresh tensor."""
        # This call sets OpenMP's number of threads for this thread, which the compiled code and oneDNN then use.
        torch.get_num_threads()
        given = [tensor.contiguous() for tensor in inputs]  # keeps their memory alive while the code runs
        result = torch.empty(*shape)
        # The code takes ownership of these handles, even if it fails, so they are not deleted below.
        handles = (c_void_p * len(given))(*map(self._handle, given))
        made, into = (c_void_p * 1)(), c_void_p(self._handle(result))
        try:
            run = self._library.AOTInductorModelContainerRun
            self._check(run(self._container, handles, len(given), made, 1, None, None))
            self._check(self._library.aoti_torch_copy_(into, made[0], 0))
        finally:
            for handle in (made[0], into):
                if handle:
                    self._library.aoti_torch_delete_tensor_object(handle)
        return result

    def __del__(self) -> None:
        # No call can be running, as each call holds a reference to this object. The library itself is never unloaded: OpenMP's
        # threads may still be in its code.
        if self._container:
            self._library.AOTInductorModelContainerDelete(self._container)

    def _handle(self, tensor: Tensor) -> int:
        """A handle of the C interface for the tensor's memory, which is not copied."""
        handle, numbers = c_void_p(), c_int64 * tensor.dim()
        sizes, strides = numbers(*tensor.shape), numbers(*tensor.stride())
        place = self._library.aoti_torch_device_type_cpu()
        create = self._library.aoti_torch_create_tensor_from_blob
        dtype = self._dtypes[tensor.dtype]
        self._check(create(tensor.data_ptr(), tensor.dim(), sizes, strides, 0, dtype, place, 0, byref(handle)))
        return handle.value or 0

    @staticmethod
    def _check(failed: int) -> None:
        if failed:  # the library has printed the reason to standard error
            raise RuntimeError("the compiled code failed (the reason is on standard error)")
