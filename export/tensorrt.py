"""Build plans for TensorRT and TensorRT-RTX: strongly typed, from an ONNX graph in that precision, for one kind of GPU.

TensorRT must build on the kind of GPU that will run the plan, as it times kernels there. TensorRT-RTX builds for any GPU on any
machine, as it compiles kernels when a plan is loaded. The two packages have the same API, so this module serves both.
"""

import copy
import importlib
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uni_instruct.bundle import Bundle
from uni_instruct.engines.hardware.cuda import gpus
from uni_instruct.engines.tensorrt import PACKAGES, last_error, logger
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.export.capabilities import BATCH_PROFILE, BUILDABLE_WITHOUT_GPU
from uni_instruct.export.graph import write_graph
from uni_instruct.system.files import disk_errors

if TYPE_CHECKING:
    import types

# The first opset with GroupNormalization in 16 bits and convolutions in bf16.
OPSET = 22


def check_machine(runtime: str, sm: int) -> None:
    """Raises RequestError if this machine cannot build for the compute capability `sm` (89 for 8.9)."""
    here = sorted({gpu.sm for gpu in gpus()})
    if runtime in BUILDABLE_WITHOUT_GPU or sm in here:
        return
    found = f"has {', '.join(f'sm{one}' for one in here)}" if here else "has no GPU"
    raise RequestError(
        f"{runtime} can build for sm{sm} only on a machine with such a GPU, and this machine {found}",
        remedy="export on the machine that will run it, or use --to tensorrt-rtx",
        param="sm",
    )


def build(bundle: Bundle, path: Path, precision: str, *, runtime: str, sm: int) -> dict[str, str]:
    """Write the plan to `path`. Returns the versions of the tools. Raises UniInstructError if TensorRT refuses the graph."""
    trt = importlib.import_module(PACKAGES[runtime])
    graph, versions = _graph(bundle.path.resolve(), bundle.weights_sha256, precision)
    path.write_bytes(_plan(trt, graph, runtime, sm))
    return {**dict(versions), PACKAGES[runtime]: trt.__version__}


# Plans of one precision for several compute capabilities are built one after the other from the same graph. Making the graph
# takes most of the time, so the last one is kept.
@lru_cache(maxsize=1)
def _graph(bundle: Path, weights_sha256: str, precision: str) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """The bundle's ONNX graph, and the versions of the tools. weights_sha256 only serves as part of the cache's key."""
    with tempfile.TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        file = Path(scratch, "graph.onnx")
        versions = write_graph(Bundle.open(bundle), file, copy.deepcopy, precision=precision, opset=OPSET, cast_last=True)
        return file.read_bytes(), tuple(versions.items())


def _plan(trt: "types.ModuleType", graph: bytes, runtime: str, sm: int) -> Any:
    log = logger(trt)
    builder = trt.Builder(log)
    # Without this flag, TensorRT 10 would choose precisions by itself. Later versions never do, and may lack the flag.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise _refused(runtime, sm, reasons)
    config = builder.create_builder_config()
    if runtime in BUILDABLE_WITHOUT_GPU:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    # TF32 keeps only 11 bits of each factor, so an engine called fp32 must not use it.
    config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for port in map(network.get_input, range(network.num_inputs)):
        profile.set_shape(port.name, *((size, *tuple(port.shape)[1:]) for size in BATCH_PROFILE))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused(runtime, sm, last_error())
    return plan


def _refused(runtime: str, sm: int, reason: str) -> UniInstructError:
    return UniInstructError(
        f"{runtime} cannot build for sm{sm}: {' '.join(reason.split())[:300]}",
        remedy="use another precision or runtime",
    )
