"""Sets of samples: `SampleSet` before it is written, `Samples` after it is read."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NotRequired, TypedDict

import numpy as np

from uni_instruct.data import Dataset
from uni_instruct.data.dataset import ImageReader
from uni_instruct.spec import ModelSpec

READ_BATCH = 256


class RequestFacts(TypedDict):
    """The values that identify a request. steps: for teachers only. images_per_shard: only while the set is unfinished."""

    generator: str
    weights_sha256: str
    engine: str
    batch: int
    images: int
    seeds_sha256: str
    class_ids_sha256: str | None
    steps: NotRequired[int]
    images_per_shard: NotRequired[int]


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """A set of samples to write: images or a VAE's latents in the order of the seeds; class_ids int64 [N] or None."""

    spec: ModelSpec
    seeds: Sequence[int] = field(repr=False)
    class_ids: np.ndarray | None = field(repr=False)
    reader: ImageReader = field(repr=False)
    request: RequestFacts

    def dataset(self) -> Dataset:
        """The set as a data set, for training on it or scoring it."""
        spec = self.spec
        return Dataset(
            name=f"{spec.name}-samples",
            image_shape=spec.image_shape,
            labels=self.class_ids,
            num_classes=spec.num_classes,
            class_names=tuple(spec.class_name(class_id) for class_id in range(spec.num_classes)),
            licence=spec.licence,
            source=f"uni-instruct generate, weights {self.request['weights_sha256']}",
            reader=self.reader,
        )

    def record(self, **more: list[str]) -> str:
        """The text of samples.json."""
        return json.dumps({"request": self.request, "seeds": list(self.seeds)} | more)

    def parts(self) -> Iterator[np.ndarray]:
        """The images in order and in parts: uint8 [<=READ_BATCH, H, W, C], or latents float32 [<=READ_BATCH, C, H, W]."""
        for start in range(0, len(self.reader), READ_BATCH):
            yield self.reader.read(np.arange(start, min(start + READ_BATCH, len(self.reader))))


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """A set of samples that was read from disk, in the order of the request.

    images: uint8 [N, H, W, C], or latents float32 [N, C, H, W]. seeds: int64 [N]. class_ids: int64 [N], None without classes.
    request: what made the images.
    """

    images: np.ndarray = field(repr=False)
    seeds: np.ndarray
    class_ids: np.ndarray | None
    request: RequestFacts
