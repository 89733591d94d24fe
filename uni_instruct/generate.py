"""Seeds and classes to images: the one pipeline that the command line, the HTTP service and the demo share."""

from collections.abc import Iterator, Sequence

import numpy as np

from uni_instruct.engine import Engine
from uni_instruct.errors import RequestError
from uni_instruct.noise import check_seeds, noise, random_class_ids
from uni_instruct.spec import ModelSpec


def generate(engine: Engine, seeds: Sequence[int], class_ids: np.ndarray | None, batch: int = 64) -> np.ndarray:
    """Images of the seeds, in their order: uint8 [N, H, W, C]. class_ids: int64 [N], as `resolve_class_ids` gives them.

    Where the spec makes no pictures, a VAE's latents as the network makes them: float32 [N, C, H, W].
    """
    parts = list(generate_batches(engine, seeds, class_ids, batch))
    size, dtype = sample_format(engine.spec)
    return np.concatenate(parts) if parts else np.empty((0, *size), dtype=dtype)


def generate_batches(
    engine: Engine, seeds: Sequence[int], class_ids: np.ndarray | None, batch: int = 64
) -> Iterator[np.ndarray]:
    """The same, batch by batch: each uint8 [<=batch, H, W, C], or float32 latents [<=batch, C, H, W]."""
    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        z = noise(seeds[part], engine.spec.noise_shape)
        labels = None if class_ids is None else class_ids[part]
        yield engine(z, labels) if engine.spec.makes_pictures else engine.outputs(z, labels).images


def resolve_class_ids(spec: ModelSpec, seeds: Sequence[int], classes: Sequence[int | str] | None = None) -> np.ndarray | None:
    """A class id per seed, int64 [N]; None for an unconditional generator.

    classes: ids or names, one for all seeds or one for each; where none is given, each seed draws its own class.
    Raises RequestError for seeds out of range, unknown classes, or a number of classes that is neither 1 nor N.
    """
    check_seeds(seeds)
    if not spec.num_classes:
        if classes:
            raise RequestError(f"generator '{spec.name}' has no classes", remedy="leave the class out", param="classes")
        return None
    if not classes:
        return random_class_ids(seeds, spec.num_classes)
    if len(classes) not in (1, len(seeds)):
        raise RequestError(
            f"{len(classes)} classes were given for {len(seeds)} seeds",
            remedy="give one class, or one for each seed",
            param="classes",
        )
    ids = np.array([spec.class_id(label) for label in classes], dtype=np.int64)
    return np.broadcast_to(ids, (len(seeds),)).copy()


def by_class(spec: ModelSpec, seeds: Sequence[int]) -> list[int]:
    """The classes in equal shares of the seeds, one after the other: row r of a sheet with a row for each is class r.

    Raises RequestError where there are no classes, or the seeds cannot be shared out equally.
    """
    if not spec.num_classes:
        raise RequestError(f"generator '{spec.name}' has no classes", remedy="leave --by-class out", param="by_class")
    share, rest = divmod(len(seeds), spec.num_classes)
    if rest or not share:
        remedy = f"give {max(1, share) * spec.num_classes} seeds, or another multiple of {spec.num_classes}"
        raise RequestError(
            f"{len(seeds)} seeds cannot be shared out equally to {spec.num_classes} classes", remedy=remedy, param="by_class"
        )
    return [class_id for class_id in range(spec.num_classes) for _ in range(share)]


def sample_format(spec: ModelSpec) -> tuple[tuple[int, int, int], type[np.uint8] | type[np.float32]]:
    """Size and type of one sample: uint8 [H, W, C] of a picture, float32 [C, H, W] of latents."""
    return (image_size(spec), np.uint8) if spec.makes_pictures else (spec.noise_shape, np.float32)


def image_size(spec: ModelSpec) -> tuple[int, int, int]:
    """(H, W, C) of the images, from the spec's [C, H, W]."""
    channels, height, width = spec.image_shape
    return height, width, channels
