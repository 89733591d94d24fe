"""What a recipe's precision means: the arithmetic of matrix products, and what stays in full float32."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning_fabric.plugins.precision import MixedPrecision, Precision

from uni_instruct.networks.float32 import full_float32


def arithmetic_of(precision: str) -> AbstractContextManager[None]:
    """A context in which GPUs multiply as the recipe's precision says. '32-true' means full float32 without TF32, as in EDM.

    By default, cuDNN rounds the inputs of convolutions to TF32. With 16-bit products almost no product is left in float32, so
    nothing is changed then.
    """
    return full_float32() if precision == "32-true" else nullcontext()


class _InnerAutocast(MixedPrecision):
    """Autocast inside the networks, while their inputs (images and noise levels) stay in float32.

    Fabric's own plugin also converts the inputs. At sigma = 80 that would round away the image under the noise.
    """

    def convert_input(self, data: Any) -> Any:
        return data


class _InnerBFloat16(_InnerAutocast):
    """bfloat16 needs no loss scaler, so the plain backward pass is used, and gradients of single terms can be measured."""

    backward = Precision.backward


AUTOCASTS = {"bf16-mixed": _InnerBFloat16, "16-mixed": _InnerAutocast}
