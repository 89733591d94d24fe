"""Plans for TensorRT and TensorRT-RTX: strongly typed, from an ONNX graph of the precision itself, for one kind of GPU.

TensorRT builds on the GPU that will run the plan, as it times kernels there. TensorRT-RTX builds for any on any machine, as its
kernels are compiled where the plan is loaded. Their Python packages are alike; one file serves both.
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
from uni_instruct.export.capabilities import ANYWHERE, BATCH_PROFILE
from uni_instruct.export.graph import write_graph
from uni_instruct.files import disk_errors

if TYPE_CHECKING:
    import types

# The first whose GroupNormalization may be in 16 bits, and that has convolutions in bf16.
OPSET = 22


def check_machine(runtime: str, sm: int) -> None:
    """Raises RequestError where this machine cannot build for that compute capability."""
    here = sorted({gpu.sm for gpu in gpus()})
    if runtime in ANYWHERE or sm in here:
        return
    found = f"has {', '.join(f'sm{one}' for one in here)}" if here else "has no GPU"
    raise RequestError(
        f"{runtime} builds for sm{sm} on such a GPU alone, and this machine {found}",
        remedy="export on the machine that will run it, or use --to tensorrt-rtx",
        param="sm",
    )


def build(bundle: Bundle, path: Path, precision: str, *, runtime: str, sm: int) -> dict[str, str]:
    """Writes the plan. Returns the versions of the tools. Raises UniInstructError where TensorRT refuses the graph."""
    trt = importlib.import_module(PACKAGES[runtime])
    graph, versions = _graph(bundle.path.resolve(), bundle.weights_sha256, precision)
    path.write_bytes(_plan(trt, graph, runtime, sm))
    return {**dict(versions), PACKAGES[runtime]: trt.__version__}


# Several compute capabilities of one precision are built one after the other, and tracing takes most of the time.
@lru_cache(maxsize=1)
def _graph(bundle: Path, weights_sha256: str, precision: str) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    """The ONNX graph of a bundle with those weights, and the versions of the tools."""
    with tempfile.TemporaryDirectory() as scratch, disk_errors(Path(scratch)):
        file = Path(scratch, "graph.onnx")
        versions = write_graph(Bundle.open(bundle), file, copy.deepcopy, precision=precision, opset=OPSET, bytes_last=True)
        return file.read_bytes(), tuple(versions.items())


def _plan(trt: "types.ModuleType", graph: bytes, runtime: str, sm: int) -> Any:
    log = logger(trt)
    builder = trt.Builder(log)
    # TensorRT 10 would choose precisions by itself; its successors cannot, and need not have the word.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise _refused(runtime, sm, reasons)
    config = builder.create_builder_config()
    if runtime in ANYWHERE:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    # TF32 keeps 11 bits of each factor, and would be taken for fp32.
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
