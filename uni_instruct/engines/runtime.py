"""The Engine protocol, and RUNTIMES, the table of the runtimes that implement it."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol

import numpy as np

from uni_instruct.class_mixture import ClassIds
from uni_instruct.engines.compiled.compiler import check_compiler
from uni_instruct.engines.hardware.cuda import gpus
from uni_instruct.engines.hardware.device import CPU, CUDA, device_index, device_type
from uni_instruct.engines.outputs import Outputs
from uni_instruct.engines.record import COMPILED, EngineId
from uni_instruct.errors import MissingExtraError, RequestError
from uni_instruct.spec import ModelSpec


class Engine(Protocol):
    """A generator, ready to run on one device. Safe to call from several threads. Returns fresh arrays, never its own buffers.

    noise: float32 [B, *noise_shape], N(0, 1), with any batch size B >= 1. class_ids: int64 [B] in range, or None if and only if
    the spec has no classes. If `mixes_classes`, a `ClassMixture` of B images is accepted too; else it raises RequestError.
    """

    spec: ModelSpec
    id: EngineId
    device: str
    mixes_classes: bool

    def __call__(self, noise: np.ndarray, class_ids: ClassIds | None) -> np.ndarray:
        """Make the images: uint8 [B, H, W, C]. Raises RequestError if the spec makes latents instead of pictures."""
        ...

    def outputs(self, noise: np.ndarray, class_ids: ClassIds | None) -> Outputs:
        """Make the images, and return them both as pixels and before rounding. Latents have no pixels (`Outputs`)."""
        ...

    def close(self) -> None:
        """Free the engine's memory. It cannot be called afterwards."""
        ...


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A runtime: its engine class, as 'module:name' that is imported when an engine is opened, and the package it needs.

    distributions: the names under which the package can be installed; only one of them may be. extra: the extra of this package
    that installs it. devices: the kinds of device it runs on; 'cuda' needs one of cuda_distributions, in a build with CUDA.
    has_streams: whether it can split a batch into parts that run at the same time.

    The class takes `(bundle, stored, device=..., spin=...)`; with has_streams also `streams=...`, the number of those parts.
    A class that runs the weights themselves takes `(bundle, device=..., precision=..., target=...)`.
    """

    name: str
    engine_class: str
    package: str
    distributions: tuple[str, ...]
    extra: str
    devices: tuple[str, ...] = (CPU,)
    cuda_distributions: tuple[str, ...] = ()
    has_streams: bool = False

    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        try:
            return importlib.util.find_spec(self.package) is not None
        except (ImportError, ValueError):  # the import is blocked: sys.modules holds None, or a finder raises
            return False

    def version(self) -> str:
        """Name and version of its package, as 'onnxruntime 1.32.0'; the name alone if the version is not known."""
        found = _installed(self.distributions)
        return found[0] if found else self.package

    def device_for(self, engine_id: EngineId, wanted: str | None) -> str:
        """The device on which it runs that engine: the wanted one ('cpu' or 'cuda:1'); by default a GPU if it can use one.

        Raises MissingExtraError if its package is missing. Raises RequestError if the engine does not run on the wanted device
        (it never falls back to another one), or if it needs a compiler and there is none.
        """
        if not self.is_installed():
            raise MissingExtraError(self.package, extra=self.extra)
        rivals = _installed(self.distributions)
        if len(rivals) > 1:
            names = " ".join(self.distributions)
            raise RequestError(
                f"{' and '.join(rivals)} are both installed, but they share files and break each other",
                remedy=f"pip uninstall -y {names}, then pip install the one that you need",
                param="engine",
            )
        can_use_a_gpu = CUDA in self._devices(engine_id) and bool(gpus()) and self._has_cuda()
        device = wanted or (f"{CUDA}:{_fitting_gpu(engine_id)}" if can_use_a_gpu else self.devices[0])
        self._check_device(engine_id, device)
        if engine_id.target == COMPILED:
            check_compiler()
        return device

    def _devices(self, engine_id: EngineId) -> tuple[str, ...]:
        # Compiled code has not been tested on a GPU, where CUDA graphs serve the same purpose.
        return (CPU,) if engine_id.target == COMPILED else self.devices

    def _has_cuda(self) -> bool:
        # torch has CPU and CUDA builds under one name. A CPU build's version ends with +cpu, as in 2.13.0+cpu.
        return any(not name.endswith("+cpu") for name in _installed(self.cuda_distributions))

    def _check_device(self, engine_id: EngineId, device: str) -> None:
        kind = device_type(device)
        if kind not in self._devices(engine_id):
            there = " or ".join(self._devices(engine_id))
            raise RequestError(
                f"engine {engine_id} does not run on {device}",
                remedy=f"use --device {there}, or another engine",
                param="device",
            )
        if kind == CUDA and not gpus():
            raise RequestError(
                f"engine {engine_id} needs a CUDA device, and this process sees none",
                remedy="use an engine of another runtime; with a GPU in the machine, check nvidia-smi and CUDA_VISIBLE_DEVICES",
                param="device",
            )
        if kind == CUDA and not self._has_cuda():
            # torch's builds have one name. onnxruntime-gpu is the CUDA build of onnxruntime.
            build = "" if self.cuda_distributions != self.distributions else "a CUDA build of "
            raise RequestError(
                f"{self.version()} cannot use {device}",
                remedy=f"install {build}{' or '.join(self.cuda_distributions)} instead, or use --device {CPU}",
                param="device",
            )
        if kind == CUDA and engine_id.target and engine_id.target != f"sm{gpus()[device_index(device)].sm}":
            name, sm = gpus()[device_index(device)]
            raise RequestError(
                f"engine {engine_id} runs only on GPUs of compute capability {engine_id.target}, "
                f"and {device} ({name}) has sm{sm}",
                remedy=f"export it with --to {engine_id.runtime} --sm {sm}, or use another engine",
                param="device",
            )

    def load_class(self) -> Callable[..., Engine]:
        """Import the engine class."""
        module, _, name = self.engine_class.partition(":")
        found: Callable[..., Engine] = getattr(importlib.import_module(module), name)
        return found


# All runtimes by name. Their order is the order of preference between engines of similar speed.
RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            name="onnx",
            engine_class="uni_instruct.engines.onnxruntime:OnnxEngine",
            package="onnxruntime",
            distributions=("onnxruntime", "onnxruntime-gpu"),
            extra="serve",
            devices=(CPU, CUDA),
            cuda_distributions=("onnxruntime-gpu",),
        ),
        Runtime(
            name="openvino",
            engine_class="uni_instruct.engines.openvino:OpenVinoEngine",
            package="openvino",
            distributions=("openvino",),
            extra="serve",
            has_streams=True,
        ),
        Runtime(
            name="tensorrt",
            engine_class="uni_instruct.engines.tensorrt:TensorRtEngine",
            package="tensorrt",
            distributions=("tensorrt",),
            extra="gpu",
            devices=(CUDA,),
            cuda_distributions=("tensorrt",),
        ),
        Runtime(
            name="tensorrt-rtx",
            engine_class="uni_instruct.engines.tensorrt:TensorRtEngine",
            package="tensorrt_rtx",
            distributions=("tensorrt_rtx",),
            extra="tensorrt-rtx",
            devices=(CUDA,),
            cuda_distributions=("tensorrt_rtx",),
        ),
        Runtime(
            name="torch",
            engine_class="uni_instruct.engines.torch:TorchEngine",
            package="torch",
            distributions=("torch",),
            extra="train",
            devices=(CPU, CUDA),
            cuda_distributions=("torch",),
        ),
    )
}


def _fitting_gpu(engine_id: EngineId) -> int:
    """The index of the first GPU of the kind that the engine was built for; 0 if there is none, or if it runs on any."""
    return next((index for index, gpu in enumerate(gpus()) if engine_id.target == f"sm{gpu.sm}"), 0)


def _installed(distributions: tuple[str, ...]) -> list[str]:
    """Name and version of each of these distributions that is installed."""
    found = []
    for distribution in distributions:
        try:
            found.append(f"{distribution} {version(distribution)}")
        except PackageNotFoundError:
            continue
    return found
