"""Which convolutions of a generator must keep float32 where the others are rounded: their error reaches the pixels undamped.

Measured by rounding one convolution at a time to bf16 (docs/export.md, "bf16"): of emoji's squared error the first and the last
convolution, those of the first block, and the 1x1 convolutions beside a block make 82 %, and little of the work.
"""

import re
from collections.abc import Sequence

from uni_instruct.spec import ModelSpec

# Of the block behind the first convolution, and of the block before the last one, the two convolutions.
_BLOCK = 2
# By the names that networks give their layers: what stands beside a block, and the image's other ways in and out.
_BESIDE = re.compile(r"\.(skip|conv_skip)\.weight$|_aux_\w+\.weight$")


def sensitive_layers(
    convolutions: Sequence[tuple[str, Sequence[int]]], spec: ModelSpec, *, last_block: bool = False, first_block: bool = True
) -> set[int]:
    """Positions of those to keep, of convolutions in the order of their work: name and shape [out, in, h, w] of the weights.

    last_block: keep the last one as well, as what rounds to 8 bits needs. first_block: keep the first one, and what stands
    beside blocks; what is left of an engine in 8 bits gains nothing by it.
    """
    # What the network reads and writes: the channels of a pixel, or of a patch of them; EDM2 also reads a channel of ones.
    few = spec.noise_shape[0] * int(spec.network_args.get("patch", 1)) ** 2 + 1
    ends = {i for i, (_, shape) in enumerate(convolutions) if min(shape[:2]) <= few}
    beside = {i for i, (name, _) in enumerate(convolutions) if _BESIDE.search(name)}
    inner = [i for i in range(len(convolutions)) if i not in ends | beside]
    kept = ends | set(inner[-_BLOCK:] if last_block else ())
    return kept | beside | set(inner[:_BLOCK]) if first_block else kept
