"""How many images a check makes, and of which classes: for engines (parity.py) and for weights in half precision."""

import numpy as np

from uni_instruct.spec import ModelSpec

# Limits for heavy networks: there, 64 images on a CPU take longer than building the engine, and one image of each of a thousand
# classes would take hours.
HEAVY_IMAGES, HEAVY_CLASSES = 16, 32


def checked_images(spec: ModelSpec, wanted: int) -> int:
    """How many images to check: `wanted`, but at least one per class.

    For a heavy network (`flops.is_heavy`): HEAVY_IMAGES, but at least one for each of at most HEAVY_CLASSES classes. Fewer if
    the decoder makes large pictures (`ModelSpec.images_for_check`).
    """
    from uni_instruct.networks.flops import is_heavy

    images, classes = (HEAVY_IMAGES, min(spec.num_classes, HEAVY_CLASSES)) if is_heavy(spec) else (wanted, spec.num_classes)
    return spec.images_for_check(max(images, classes))


def check_class_ids(spec: ModelSpec, count: int) -> np.ndarray | None:
    """A class for each image: all classes in turn; evenly spaced ones if there are fewer images than classes.

    int64 [count]; None without classes.
    """
    if not spec.num_classes:
        return None
    places = np.arange(count, dtype=np.int64)
    return places % spec.num_classes if count >= spec.num_classes else places * spec.num_classes // count
