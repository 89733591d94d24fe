"""Build the engines for OpenVINO. All tensors have four dimensions, as OpenVINO loses time at every change of layout.

In fp32 the file is ONNX, which OpenVINO reads as it is. bf16 and int8 need facts that ONNX cannot hold: which layers keep
float32, and which are quantized. So their file is OpenVINO's own two files in one zip (engines/openvino_file.py).

How many layers can be bf16 depends on the generator. What float32 layers cost depends on the processor: if matrix units run the
convolutions, the other layers take half of the time. So there are several ways to build an engine, from the fastest to the most
exact. The export uses the first whose engine agrees with torch.
"""

import logging
import tempfile
from pathlib import Path

import openvino

from uni_instruct.bundle import Bundle
from uni_instruct.engines.openvino import check_precision
from uni_instruct.engines.record import EngineId
from uni_instruct.engines.worker_process import run_worker
from uni_instruct.errors import CompilationError
from uni_instruct.export.canonical_blocks import FourDimensionalNorm
from uni_instruct.export.graph import write_graph
from uni_instruct.export.openvino_worker import ALL_BF16, FIRST_QUARTER_BF16, FLOAT32_CONVOLUTIONS
from uni_instruct.export.quantize import check_installed, versions
from uni_instruct.system.processes import release_freed_memory

# Precision -> the ways to build it, from the fastest engine to the most exact.
WAYS = {"bf16": (ALL_BF16, *FLOAT32_CONVOLUTIONS), "int8": (ALL_BF16, "convolutions in bf16", FIRST_QUARTER_BF16)}
# Precision -> how the ONNX graph stores weights (`write_graph`). int8 needs them as plain float32: NNCF finds a convolution's
# weights only if no other node, such as the cast of float16 weights, is between them.
_WEIGHTS = {"bf16": "rounded", "int8": "wide"}
_log = logging.getLogger(__name__)


def check_machine(precision: str) -> None:
    """Raises RequestError if this processor lacks the precision: an engine must run here to be checked.

    Raises MissingExtraError without OpenVINO, or for int8 without NNCF.
    """
    if precision == "int8":
        check_installed()
    check_precision(EngineId("openvino", precision))


def build(bundle: Bundle, path: Path, precision: str, way: str = "") -> dict[str, str]:
    """Write the engine's file. Returns the versions of the tools.

    way: one of WAYS[precision]; '' for fp32, which has only one way. Raises RequestError if the weights do not fit into one
    file, MissingExtraError without NNCF, CompilationError if OpenVINO or NNCF fails.
    """
    if precision == "int8":
        check_installed()
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        graph = Path(scratch, "graph.onnx") if precision in WAYS else path
        tools = write_graph(bundle, graph, FourDimensionalNorm, weights=_WEIGHTS.get(precision, "exact"))
        if precision in WAYS:
            release_freed_memory()  # the worker needs memory for the weights now
            _run_worker(bundle, precision, way, graph, path)
    return {**tools, **(versions() if precision == "int8" else {}), "openvino": openvino.__version__}


def _run_worker(bundle: Bundle, precision: str, way: str, graph: Path, path: Path) -> None:
    engine_id = EngineId("openvino", precision)
    done = run_worker(
        "uni_instruct.export.openvino_worker",
        [str(bundle.path.resolve()), precision, way, str(graph.resolve()), str(path.resolve())],
        lambda past_s: _log.info("building engine %s: %.0f s", engine_id, past_s),
    )
    assert done is not None, "no time limit was set"
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise CompilationError(
            f"engine {engine_id} cannot be built here: {reason[:300]}",
            remedy="export an engine of another precision, such as openvino-fp32",
        )
