"""How many images and which classes a check makes: for engines (parity.py) and for weights in half precision alike."""

import numpy as np

from uni_instruct.spec import ModelSpec

# Of a heavy network 64 images take a CPU longer than the engine's making. Nor can each of a thousand classes be tried: that
# would be hours.
HEAVY_IMAGES, HEAVY_CLASSES = 16, 32


def checked_images(spec: ModelSpec, wanted: int) -> int:
    """So many images, and at least one of each class; of a heavy network HEAVY_IMAGES, and one of each of HEAVY_CLASSES."""
    from uni_instruct.networks.flops import is_heavy

    images, classes = (HEAVY_IMAGES, min(spec.num_classes, HEAVY_CLASSES)) if is_heavy(spec) else (wanted, spec.num_classes)
    return spec.affordable_images(max(images, classes))


def checked_classes(spec: ModelSpec, count: int) -> np.ndarray | None:
    """A class for each of so many images: all in turn, or evenly spaced ones. int64 [count], None without classes."""
    if not spec.num_classes:
        return None
    places = np.arange(count, dtype=np.int64)
    return places % spec.num_classes if count >= spec.num_classes else places * spec.num_classes // count
