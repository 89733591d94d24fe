"""Would half precision be seen? Numbers that it cannot hold, and pixels that it would change."""

from collections.abc import Mapping

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.export.card import Rounding
from uni_instruct.export.checked_images import checked_classes, checked_images
from uni_instruct.noise import draw_inputs
from uni_instruct.progress import ProgressFactory, silent

# Images that decide, at least, and every class is among them; of heavy networks fewer (`checked_images`).
CHECKED_IMAGES = 512
# A pixel on the edge between two levels falls to either side whatever is rounded.
ALLOWED_LEVELS = 1


def half_precision_changes(original: Bundle, half: Bundle, shows: ProgressFactory = silent) -> Rounding:
    """What changes from the one bundle to the other, which stores the same weights in half precision."""
    from uni_instruct.networks.reference import reference_outputs

    spec = original.spec
    count = checked_images(spec, CHECKED_IMAGES)
    inputs = draw_inputs(spec, range(count), checked_classes(spec, count))
    labels = {"float32": original, "half precision": half}
    before, after = (reference_outputs(bundle, *inputs, shows, label).pixels for label, bundle in labels.items())
    return rounding_of(before, after)


def too_large(weights: Mapping[str, np.ndarray]) -> str:
    """The name of a matrix or filter with numbers that half precision cannot hold; '' where there is none.

    All are looked at. Those of a class that no image is drawn of would be seen by nobody else.
    """
    with np.errstate(over="ignore"):
        wrong = (name for name, array in weights.items() if array.ndim > 1 and not np.isfinite(array.astype(np.float16)).all())
        return next(wrong, "")


def without_half(name: str) -> Rounding:
    """The finding that half precision cannot hold the weights of that name."""
    return Rounding(images=0, largest_difference=0, changed_pixels=0.0, precision="fp32", too_large=name)


def rounding_of(before: np.ndarray, after: np.ndarray, precision: str = "") -> Rounding:
    """Between pixels of float32 and of half precision, uint8; precision: what is stored, else it follows from them."""
    levels = np.abs(after.astype(int) - before.astype(int))
    return Rounding(
        images=len(before),
        largest_difference=int(levels.max()),
        changed_pixels=float((levels > 0).mean()),
        precision=precision or ("fp16" if levels.max() <= ALLOWED_LEVELS else "fp32"),
    )
