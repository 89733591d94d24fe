"""TensorRT's and the driver's interfaces on a machine without a GPU: 'device memory' is this process's own, and the graph of an
ONNX engine runs where a plan would. What it shows is the engine's own work: batches, padding, splitting, buffers, threads."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

PROFILE = (1, 4, 16)


class HostStream:
    """`CudaStream` in this process's memory. Counts what is alive, and refuses work outside of `current`."""

    alive = 0

    def __init__(self, index: int):
        self.handle, self._inside, self._buffers, self.graphs = 7, 0, [], 0
        HostStream.alive += 1

    @contextmanager
    def current(self) -> Iterator[None]:
        self._inside += 1
        yield
        self._inside -= 1

    def device_buffer(self, size: int) -> int:
        return int(self.host_buffer(size).ctypes.data)

    def host_buffer(self, size: int) -> np.ndarray:
        assert self._inside
        self._buffers.append(np.full(size, 255, np.uint8))  # never zeros by luck
        return self._buffers[-1]

    def upload(self, address: int, source: np.ndarray) -> None:
        assert self._inside
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def download(self, target: np.ndarray, address: int) -> None:
        assert self._inside
        ctypes.memmove(target.ctypes.data, address, target.nbytes)

    def synchronize(self) -> None:
        assert self._inside

    def capture(self, enqueue: Callable[[], None]) -> int:
        self.graphs += 1
        self._captured = {**getattr(self, "_captured", {}), self.graphs: enqueue}
        return self.graphs

    def launch(self, graph: int) -> None:
        self._captured[graph]()

    def close(self) -> None:
        assert not self._inside
        self._buffers.clear()
        HostStream.alive -= 1


class _Mode(IntEnum):
    INPUT = 1
    OUTPUT = 2


class _Context:
    def __init__(self, session: onnxruntime.InferenceSession):
        self._session, self._shapes, self._addresses = session, {}, {}

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory
        assert size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return PROFILE[0] <= shape[0] <= PROFILE[-1]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream
        feeds = {name: self._view(name, shape) for name, shape in self._shapes.items()}
        for port, found in zip(self._session.get_outputs(), self._session.run(None, feeds), strict=True):
            ctypes.memmove(self._addresses[port.name], np.ascontiguousarray(found).ctypes.data, found.nbytes)
        return True

    def _view(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(np.int64 if name.endswith("_ids") else np.float32)
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer((ctypes.c_uint8 * size).from_address(self._addresses[name]), dtype).reshape(shape)


class _Engine:
    device_memory_size_v2 = 0

    def __init__(self, plan: bytes):
        self._session = onnxruntime.InferenceSession(plan)
        # In a plan there are no defaults: every port is fed.
        inputs = (*self._session.get_inputs(), *self._session.get_overridable_initializers())
        self._inputs = {port.name for port in inputs}
        self._ports = {port.name: port for port in (*inputs, *self._session.get_outputs())}
        self.num_io_tensors = len(self._ports)

    def get_tensor_name(self, index: int) -> str:
        return list(self._ports)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self._ports[name].shape[1:])

    def get_tensor_mode(self, name: str) -> _Mode:
        return _Mode.INPUT if name in self._inputs else _Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return str(self._ports[name].type)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(size, *self.get_tensor_shape(name)[1:]) for size in PROFILE]

    def create_execution_context(self, strategy: object) -> _Context:
        return _Context(self._session)


class _Logger:
    class Severity(IntEnum):
        ERROR = 1

    def __init__(self) -> None:
        pass


class _Runtime:
    def __init__(self, logger: object):
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine:
        return _Engine(plan)


class _Module(SimpleNamespace):
    """Hashable, as a module is."""

    __hash__ = object.__hash__  # type: ignore[assignment]


def tensorrt_on_host() -> Any:
    """A module with the names of `tensorrt` that an engine is run with."""
    dtypes = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}
    return _Module(
        __name__="tensorrt",
        __version__="11.0",
        Runtime=_Runtime,
        ILogger=_Logger,
        TensorIOMode=_Mode,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED=2),
        nptype=dtypes.__getitem__,
    )
