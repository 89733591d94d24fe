"""The GPUs and batch sizes for which TensorRT engines can be built. Needs none of TensorRT's packages."""

# (smallest, optimal, largest) batch of TensorRT's optimization profile. The engine splits larger batches.
BATCH_PROFILE = (1, 16, 64)
# Compute capabilities times ten. Turing (75) has no bf16, and TensorRT-RTX cannot multiply fp32 matrices on it.
_SINCE_TURING, _SINCE_AMPERE = (75, 80, 86, 89, 90, 100, 103, 120, 121), (80, 86, 89, 90, 100, 103, 120, 121)
_RTX_SINCE_TURING, _RTX_SINCE_AMPERE = (75, 80, 86, 89, 120, 121), (80, 86, 89, 120, 121)
# Runtime -> precision -> the compute capabilities it can be built for.
CAPABILITIES = {
    "tensorrt": {"fp32": _SINCE_TURING, "fp16": _SINCE_TURING, "bf16": _SINCE_AMPERE},
    "tensorrt-rtx": {"fp32": _RTX_SINCE_AMPERE, "fp16": _RTX_SINCE_TURING, "bf16": _RTX_SINCE_AMPERE},
}
# Runtimes whose engines can be built on a machine without the GPU they are for.
BUILDABLE_WITHOUT_GPU = ("tensorrt-rtx",)
