"""Runs a library that torch's inductor compiled ahead of time, through its C interface.

torch's own loader holds Python's interpreter while the code runs: the event loop of a server would stand still for as long as a
batch takes. ctypes lets go of it. The declarations are those of torch/csrc/inductor/aoti_runtime/interface.h and
aoti_torch/c/shim.h, which torch keeps stable for libraries that were compiled earlier.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, byref, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

# How many threads may be in the code at a time; others wait. Each of them uses all cores.
_AT_ONCE = 2
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
    """The compiled function of some tensors on the CPU, whose result is one float32 tensor. Safe from several threads.

    Raises OSError where the file is no library that this torch can load, RuntimeError where the code fails.
    """

    def __init__(self, path: Path):
        self._container = c_void_p()
        # What the file calls of torch is found through it as well.
        self._library = ctypes.CDLL(str(path))
        for name, arguments in _FUNCTIONS.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_int32
        self._dtypes = {
            torch.float32: self._library.aoti_torch_dtype_float32(),
            torch.int64: self._library.aoti_torch_dtype_int64(),
        }
        create = self._library.AOTInductorModelContainerCreateWithDevice
        self._check(create(byref(self._container), _AT_ONCE, b"cpu", None))

    def __call__(self, inputs: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """The result, of that shape, as a tensor of the caller's own. inputs: float32 or int64."""
        # Sets OpenMP's number of threads in this thread, which the compiled code and oneDNN ask for.
        torch.get_num_threads()
        given = [tensor.contiguous() for tensor in inputs]  # the code reads their memory, and must find it until it ends
        result = torch.empty(*shape)
        # The code takes over what it is given, whether or not it fails.
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
        # A thread that is in the code holds this object. The code itself stays loaded: OpenMP's threads may still be in it.
        if self._container:
            self._library.AOTInductorModelContainerDelete(self._container)

    def _handle(self, tensor: Tensor) -> int:
        """What the C interface calls the tensor's memory."""
        handle, numbers = c_void_p(), c_int64 * tensor.dim()
        sizes, strides = numbers(*tensor.shape), numbers(*tensor.stride())
        place = self._library.aoti_torch_device_type_cpu()
        create = self._library.aoti_torch_create_tensor_from_blob
        dtype = self._dtypes[tensor.dtype]
        self._check(create(tensor.data_ptr(), tensor.dim(), sizes, strides, 0, dtype, place, 0, byref(handle)))
        return handle.value or 0

    @staticmethod
    def _check(failed: int) -> None:
        if failed:  # it has written what failed to standard error
            raise RuntimeError("the compiled code failed, as standard error says")
