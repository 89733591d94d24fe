"""Which convolutions of a generator must keep float32 when the others are rounded: their errors reach the pixels undamped.

Measured by rounding one convolution at a time to bf16 (docs/export.md, "bf16"): the first and the last convolution, those of
the first block, and the 1x1 convolutions beside a block cause 82 % of emoji's squared error, with little of the work.
"""

import re
from collections.abc import Sequence

from uni_instruct.spec import ModelSpec

# A block has two convolutions.
_BLOCK = 2
# Layer names of the convolutions beside a block (skip connections), and of SongUNet's auxiliary inputs and outputs.
_BESIDE = re.compile(r"\.(skip|conv_skip)\.weight$|_aux_\w+\.weight$")


def sensitive_layers(
    convolutions: Sequence[tuple[str, Sequence[int]]], spec: ModelSpec, *, last_block: bool = False, first_block: bool = True
) -> set[int]:
    """The indices of the convolutions that must keep float32.

    convolutions: name and shape [out, in, h, w] of each one's weights, in the order in which they run. last_block: also keep
    those of the last block, which 8 bits need. first_block: keep those of the first block and those beside blocks; for the
    layers that an int8 engine leaves in 16 bits this gains nothing.
    """
    # The network's input and output have the channels of a pixel, or of a patch of pixels. EDM2 adds an input channel of ones.
    few = spec.noise_shape[0] * int(spec.network_args.get("patch", 1)) ** 2 + 1
    ends = {i for i, (_, shape) in enumerate(convolutions) if min(shape[:2]) <= few}
    beside = {i for i, (name, _) in enumerate(convolutions) if _BESIDE.search(name)}
    inner = [i for i in range(len(convolutions)) if i not in ends | beside]
    kept = ends | set(inner[-_BLOCK:] if last_block else ())
    return kept | beside | set(inner[:_BLOCK]) if first_block else kept
