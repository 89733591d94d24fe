"""Requests in the batcher's queue, and the engine's inputs for a batch of their images."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uni_instruct.class_mixture import ClassIds, ClassMixture
from uni_instruct.noise import Inputs, NoisePoint, noise_at_points
from uni_instruct.spec import ModelSpec


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """A request in the queue: items from index `next` on have not been given to the engine, and `left` items have no image yet.

    mixture: set if classes are mixed; class_ids then holds the first class of each pair. noise: set if it was drawn when the
    request came in. images: set with the first image. model_s: seconds of all engine calls with items of this request.
    """

    seeds: Sequence[NoisePoint]
    class_ids: np.ndarray | None
    mixture: ClassMixture | None
    noise: np.ndarray | None
    done: asyncio.Future[None]
    timeout_s: float
    left: int
    next: int = 0
    model_s: float = 0.0
    images: np.ndarray | None = None


# One image of a request: the request, and the image's index in it.
QueuedImage = tuple[QueuedRequest, int]


def batch_inputs(spec: ModelSpec, items: Sequence[QueuedImage], mixing: bool) -> Inputs:
    """Return the engine's inputs for these items. Seeds and classes were checked when the requests came in.

    mixing: whether any queued request has mixtures of classes. If not, the items are not checked for one.
    """
    class_ids: ClassIds | None = None
    if spec.num_classes:
        ids = np.array([0 if t.class_ids is None else t.class_ids[index] for t, index in items], dtype=np.int64)
        class_ids = _mixed(ids, items) if mixing else ids
    noise = np.empty((len(items), *spec.noise_shape), dtype=np.float32)
    for row, (request, index) in zip(noise, items, strict=True):
        drawn = request.noise
        row[...] = drawn[index] if drawn is not None else noise_at_points([request.seeds[index]], spec.noise_shape)[0]
    return Inputs(noise, class_ids)


def _mixed(ids: np.ndarray, items: Sequence[QueuedImage]) -> ClassIds:
    """Return the classes of a batch in which some may be mixtures. Images without a mixture get share 0, the plain class."""
    mixture = ClassMixture(ids, ids.copy(), np.zeros(len(ids), np.float32))
    for row, (request, index) in enumerate(items):
        if request.mixture is not None:
            mixture.other_ids[row], mixture.share[row] = request.mixture.other_ids[index], request.mixture.share[index]
    return mixture.simplified()
