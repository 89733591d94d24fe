"""Would storing weights in half precision be visible? Finds weights that it cannot hold, and pixels that it changes."""

from collections.abc import Mapping

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.export.card import Rounding
from uni_instruct.export.checked_images import check_class_ids, checked_images
from uni_instruct.noise import draw_inputs
from uni_instruct.system.progress import ProgressFactory, silent

# At least this many images are compared, with every class among them; fewer for heavy networks (`checked_images`).
CHECKED_IMAGES = 512
# A pixel value close to the border between two uint8 levels may change by one level at any rounding.
ALLOWED_LEVELS = 1


def half_precision_changes(original: Bundle, half: Bundle, with_progress: ProgressFactory = silent) -> Rounding:
    """Compare the images of a bundle with those of `half`, which stores the same weights in half precision."""
    from uni_instruct.networks.reference import reference_outputs

    spec = original.spec
    count = checked_images(spec, CHECKED_IMAGES)
    inputs = draw_inputs(spec, range(count), check_class_ids(spec, count))
    labels = {"float32": original, "half precision": half}
    before, after = (reference_outputs(bundle, *inputs, with_progress, label).pixels for label, bundle in labels.items())
    return rounding_of(before, after)


def too_large(weights: Mapping[str, np.ndarray]) -> str:
    """The name of a matrix or filter with values too large for half precision; '' if there is none.

    All weights are checked. Comparing images would miss those of a class of which no image is made.
    """
    with np.errstate(over="ignore"):
        wrong = (name for name, array in weights.items() if array.ndim > 1 and not np.isfinite(array.astype(np.float16)).all())
        return next(wrong, "")


def without_half(name: str) -> Rounding:
    """The finding that half precision cannot hold the weights of that name, so that they stay float32."""
    return Rounding(images=0, largest_difference=0, changed_pixels=0.0, precision="fp32", too_large=name)


def rounding_of(before: np.ndarray, after: np.ndarray, precision: str = "") -> Rounding:
    """Compare uint8 pixels made in float32 with those in half precision.

    precision: what is stored. By default it follows from the comparison: 'fp16' if no pixel differs by more than
    ALLOWED_LEVELS, else 'fp32'.
    """
    levels = np.abs(after.astype(int) - before.astype(int))
    return Rounding(
        images=len(before),
        largest_difference=int(levels.max()),
        changed_pixels=float((levels > 0).mean()),
        precision=precision or ("fp16" if levels.max() <= ALLOWED_LEVELS else "fp32"),
    )
