"""Which GPUs TensorRT's engines can be built for, and for how many images at once. Needs none of its packages."""

# (least, best, most) images at once; the engine splits what is more.
BATCH_PROFILE = (1, 16, 64)
# Compute capabilities times ten. Turing (7.5) has no bf16, and TensorRT-RTX multiplies no fp32 matrices there.
_SINCE_TURING, _SINCE_AMPERE = (75, 80, 86, 89, 90, 100, 103, 120, 121), (80, 86, 89, 90, 100, 103, 120, 121)
_RTX_SINCE_TURING, _RTX_SINCE_AMPERE = (75, 80, 86, 89, 120, 121), (80, 86, 89, 120, 121)
# Runtime -> precision -> what it can be built for.
CAPABILITIES = {
    "tensorrt": {"fp32": _SINCE_TURING, "fp16": _SINCE_TURING, "bf16": _SINCE_AMPERE},
    "tensorrt-rtx": {"fp32": _RTX_SINCE_AMPERE, "fp16": _RTX_SINCE_TURING, "bf16": _RTX_SINCE_AMPERE},
}
# Runtimes whose engines can be built without their GPU.
ANYWHERE = ("tensorrt-rtx",)
