"""Seeds and classes to images: the one pipeline that command line, HTTP, demo, training, export and evaluation share.

`input_batches` checks seeds and classes once, before any image is made, and draws the inputs batch by batch. Here an engine
makes the images of a batch; training uses its current weights instead.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from uni_instruct.class_mixture import ClassIds, ClassMixture
from uni_instruct.engine import Engine
from uni_instruct.errors import RequestError
from uni_instruct.noise import (
    Inputs,
    checked_class_ids,
    checked_ids,
    checked_seeds,
    checked_share,
    draw_inputs,
    random_class_ids,
)
from uni_instruct.spec import ModelSpec

BATCH = 64

# Ids or names, one for all images or one for each; None: each image's class is drawn from its seed.
Classes = int | str | Sequence[int | str] | np.ndarray | None


def generate_images(
    engine: Engine, seeds: Sequence[int] | np.ndarray, classes: Classes | ClassMixture = None, batch: int = BATCH
) -> np.ndarray:
    """The images of the seeds, in the seeds' order: uint8 [N, H, W, C], or float32 [N, C, H, W] if the model makes latents.

    classes: ids or names, one for all seeds or one for each, or mixtures from `mix_classes`. By default each image's class is
    drawn from its seed.
    batch: images at once.

    Raises RequestError for an invalid seed, class or batch size.
    """
    parts = list(generate_batches(engine, seeds, classes, batch))
    size, dtype = sample_format(engine.spec)
    return np.concatenate(parts) if parts else np.empty((0, *size), dtype=dtype)


def generate_batches(
    engine: Engine, seeds: Sequence[int] | np.ndarray, classes: Classes | ClassMixture = None, batch: int = BATCH
) -> Iterator[np.ndarray]:
    """As `generate_images`, but batch by batch: each uint8 [<=batch, H, W, C], or float32 latents [<=batch, C, H, W]."""
    batches = input_batches(engine.spec, seeds, classes, batch)
    if engine.spec.makes_pictures:
        return (engine(*inputs) for inputs in batches)
    return (engine.outputs(*inputs).images for inputs in batches)


def input_batches(
    spec: ModelSpec, seeds: Sequence[int] | np.ndarray, classes: Classes | ClassMixture = None, batch: int = BATCH
) -> Iterator[Inputs]:
    """Noise and class ids of the seeds, batch by batch. Raises RequestError when it is called, not at the first batch."""
    seeds = checked_seeds(seeds)
    class_ids: ClassIds | None
    if isinstance(classes, ClassMixture):
        _check_number(len(classes), len(seeds))
        # A single mixture is used for all seeds, as a single class is.
        mixed = classes[np.zeros(len(seeds), dtype=np.int64)] if len(classes) == 1 else classes
        class_ids = checked_class_ids(spec, mixed, len(seeds))
    else:
        class_ids = resolve_class_ids(spec, seeds, classes)
    if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or batch < 1:
        raise RequestError(
            f"batch {batch!r} is not a positive integer",
            remedy="give the number of images in a batch, such as 64",
            param="batch",
        )
    parts = (slice(start, start + batch) for start in range(0, len(seeds), batch))
    return (draw_inputs(spec, seeds[part], None if class_ids is None else class_ids[part]) for part in parts)


def resolve_class_ids(
    spec: ModelSpec, seeds: Sequence[int] | np.ndarray, classes: Classes = None, shares: np.ndarray | None = None
) -> np.ndarray | None:
    """A class id for each seed: int64 [N]; None for an unconditional generator.

    classes: ids or names, one for all seeds or one for each. By default each class is drawn from its seed, uniformly or in
    proportion to `shares` [num_classes].

    Raises RequestError for seeds out of range, unknown classes, or a number of classes that is neither 1 nor N.
    """
    seeds = checked_seeds(seeds)
    given = _as_sequence(classes)
    if not len(given):
        return random_class_ids(seeds, spec.num_classes, shares) if spec.num_classes else None
    if not spec.num_classes:
        raise RequestError(f"generator '{spec.name}' has no classes", remedy="leave the class out", param="classes")
    _check_number(len(given), len(seeds))
    whole = isinstance(given, np.ndarray) and given.ndim == 1 and given.dtype.kind in "iu"
    ids = given if whole else np.array([_class_id(spec, label) for label in given], dtype=np.int64)
    return checked_ids(spec, np.resize(ids, len(seeds)), len(seeds))


def mix_classes(
    spec: ModelSpec,
    start: int | str | Sequence[int | str] | np.ndarray,
    end: int | str | Sequence[int | str] | np.ndarray,
    share: ArrayLike,
) -> ClassMixture:
    """A mixture of the classes `start` and `end` for each share; share 0 is `start`, share 1 is `end`.

    start, end: ids or names, one for all shares or one for each. share: a number or numbers in [0, 1].
    `generate_images` takes one mixture for all its seeds, or one for each.

    Raises RequestError for unknown classes, for shares outside 0..1, and for a generator without classes.
    """
    shares = checked_share(share)
    first, second = (resolve_class_ids(spec, range(len(shares)), label) for label in (start, end))
    assert first is not None
    assert second is not None
    return ClassMixture(first, second, shares)


def by_class(spec: ModelSpec, seeds: Sequence[int]) -> list[int]:
    """A class id for each seed, ascending, equally many for each class. So in a sheet with one row a class, row r is class r.

    Raises RequestError if there are no classes, or the number of seeds is not a multiple of the number of classes.
    """
    if not spec.num_classes:
        raise RequestError(f"generator '{spec.name}' has no classes", remedy="leave --by-class out", param="by_class")
    share, rest = divmod(len(seeds), spec.num_classes)
    if rest or not share:
        remedy = f"give {max(1, share) * spec.num_classes} seeds, or another multiple of {spec.num_classes}"
        raise RequestError(
            f"{len(seeds)} seeds cannot be divided equally among {spec.num_classes} classes", remedy=remedy, param="by_class"
        )
    return [class_id for class_id in range(spec.num_classes) for _ in range(share)]


def sample_format(spec: ModelSpec) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape and dtype of one sample: uint8 [H, W, C] for a picture, float32 [C, H, W] for latents."""
    if spec.makes_pictures:
        return image_size(spec), np.dtype(np.uint8)
    return spec.noise_shape, np.dtype(np.float32)


def image_size(spec: ModelSpec) -> tuple[int, int, int]:
    """(H, W, C) of the images, from the spec's [C, H, W]."""
    channels, height, width = spec.image_shape
    return height, width, channels


def _check_number(classes: int, seeds: int) -> None:
    if classes not in (1, seeds):
        raise RequestError(
            f"{classes} classes were given for {seeds} seeds", remedy="give one class, or one for each seed", param="classes"
        )


def _as_sequence(classes: Classes) -> Sequence[int | str] | np.ndarray:
    """The classes as a sequence; empty for None."""
    if classes is None:
        return []
    if isinstance(classes, np.ndarray) and classes.ndim:
        return classes
    classes = classes.tolist() if hasattr(classes, "tolist") else classes
    if isinstance(classes, str | int):
        return [classes]
    if not isinstance(classes, Sequence):
        raise RequestError(
            f"classes {str(classes)[:60]!r} are not a list", remedy="give ids or names, such as [3] or ['cat']", param="classes"
        )
    return classes


def _class_id(spec: ModelSpec, label: object) -> int:
    label = label.item() if isinstance(label, np.generic) else label
    if not isinstance(label, int | str):
        raise RequestError(
            f"class {str(label)[:40]} is neither a name nor an id",
            remedy="'uni-instruct inspect' lists the classes",
            param="classes",
        )
    return spec.class_id(label)
