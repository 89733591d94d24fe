"""What a recipe's precision means: how networks multiply, and what keeps all bits of float32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning_fabric.plugins.precision import MixedPrecision, Precision

from uni_instruct.float32 import full_float32


def arithmetic_of(precision: str) -> AbstractContextManager[None]:
    """Within the block GPUs multiply as a recipe's precision says: '32-true' means all of float32's bits, as in EDM.

    By default cuDNN's convolutions would round to TF32. With 16-bit products next to nothing is left in float32.
    """
    return full_float32() if precision == "32-true" else nullcontext()


class _InnerAutocast(MixedPrecision):
    """Autocast inside the networks; images and noise levels keep 32 bits.

    Fabric's own converts inputs as well, which at sigma = 80 rounds away the image under the noise.
    """

    def convert_input(self, data: Any) -> Any:
        return data


class _InnerBFloat16(_InnerAutocast):
    """Needs no loss scaler, and so no backward pass but torch's: gradients of single terms can be taken."""

    backward = Precision.backward


AUTOCASTS = {"bf16-mixed": _InnerBFloat16, "16-mixed": _InnerAutocast}
