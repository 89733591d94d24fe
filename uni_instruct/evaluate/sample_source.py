"""The images to score: those that a bundle makes from seeds, or images that exist already."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from uni_instruct.bundle import Bundle
from uni_instruct.class_map import format_class_names, has_names, ids_by_name, unmatched_name
from uni_instruct.data import Dataset
from uni_instruct.engine import TORCH, TORCH_COMPILED, select_engine
from uni_instruct.evaluate.image_sources import BundleImages, DatasetImages
from uni_instruct.evaluate.statistics import Statistics
from uni_instruct.generate import resolve_class_ids
from uni_instruct.spec import ImageShape


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleSource:
    """Images to score, and where they come from.

    seeds: int64 [count], the seeds; for existing images, their indices.
    class_ids: int64 [count], the class ids for the generator, or None.
    expected: int64 [count], the classes in the reference's numbering, or None. If the images have classes that the reference
    lacks, it is None and `note` says why.
    engine, weights_sha256, steps: empty, empty and 0 for existing images.
    """

    source: str
    count: int
    image_shape: ImageShape
    images: BundleImages | DatasetImages = field(repr=False)
    seeds: np.ndarray = field(repr=False)
    class_ids: np.ndarray | None = field(repr=False, default=None)
    expected: np.ndarray | None = field(repr=False, default=None)
    engine: str = ""
    weights_sha256: str = ""
    steps: int = 0
    note: str = ""

    def parts(self, sets: int) -> "list[SampleSource]":
        """Divide the images into `sets` consecutive sets of equal size. A remainder is left out."""
        size = self.count // sets
        rows = [slice(start, start + size) for start in range(0, size * sets, size)]
        return [
            replace(
                self,
                count=size,
                seeds=self.seeds[part],
                class_ids=None if self.class_ids is None else self.class_ids[part],
                expected=None if self.expected is None else self.expected[part],
            )
            for part in rows
        ]


def bundle_samples(
    bundle: Bundle,
    seeds: Sequence[int],
    engine: str | None,
    batch: int,
    reference: Dataset | Statistics,
    class_ids: np.ndarray | None = None,
    device: str | None = None,
) -> SampleSource:
    """The images that the bundle makes from the seeds.

    class_ids: by default each image's class is drawn from its seed, uniformly.
    engine: as for `open_engine`. A teacher always runs on torch, compiled if that engine is requested: no other runtime has
    its sampler.

    Raises RequestError if the bundle makes latents, or has no such engine on that device.
    """
    bundle.check_makes_pictures()
    of_teacher = TORCH_COMPILED if engine == str(TORCH_COMPILED) else TORCH
    chosen = str(select_engine(bundle, of_teacher if bundle.spec.steps > 1 else engine, device).engine_id)
    class_ids = resolve_class_ids(bundle.spec, seeds) if class_ids is None else class_ids
    names = tuple(bundle.spec.class_name(number) for number in range(bundle.spec.num_classes))
    mapped, note = reference_class_ids(class_ids, names, reference)
    return SampleSource(
        source=str(bundle.path),
        count=len(seeds),
        image_shape=bundle.spec.image_shape,
        images=BundleImages(bundle=bundle.path, engine=chosen, batch=batch, steps=bundle.spec.steps, device=device),
        seeds=np.array(seeds, dtype=np.int64),
        class_ids=class_ids,
        expected=mapped,
        engine=chosen,
        weights_sha256=bundle.weights_sha256,
        steps=bundle.spec.steps,
        note=note,
    )


def dataset_samples(
    dataset: Dataset, samples: int | None, batch: int, reference: Dataset | Statistics, opened_as: str = ""
) -> SampleSource:
    """Images of a data set: `samples` of them, evenly spaced, or all. opened_as: what workers pass to `open_dataset`."""
    count = min(samples or len(dataset), len(dataset))
    # Evenly spaced, because folders are sorted by class: the first thousand images might all be of one class.
    chosen = np.arange(count) * len(dataset) // count
    labels = None if dataset.labels is None else dataset.labels[chosen]
    mapped, note = reference_class_ids(labels, dataset.class_names, reference)
    if labels is None and isinstance(reference, Dataset) and reference.num_classes:
        note = "no class_accuracy: the images have no classes"
    return SampleSource(
        source=dataset.source,
        count=count,
        image_shape=dataset.image_shape,
        images=DatasetImages(source=opened_as or dataset.source, batch=batch, opened=dataset),
        seeds=chosen,
        expected=mapped,
        note="; ".join(part for part in (note, dataset.note) if part),
    )


def reference_class_ids(
    class_ids: np.ndarray | None, names: tuple[str, ...], reference: Dataset | Statistics
) -> tuple[np.ndarray | None, str]:
    """The class ids in the reference's numbering, matched by name, and ''. (None, the reason) if the reference lacks a name.

    The ids are returned unchanged if the classes have no names, or if the reference is statistics, which have no classes.
    (None, '') if there are no class ids, or the reference is a data set without classes.
    """
    if class_ids is None or (isinstance(reference, Dataset) and not reference.num_classes):
        return None, ""
    theirs = reference.class_names if isinstance(reference, Dataset) else names
    if not has_names(names) and class_ids.max(initial=0) < len(theirs):
        return class_ids, ""
    ids = ids_by_name(names, theirs)
    if ids is None:
        unknown = unmatched_name(names, theirs)
        return None, f"no class_accuracy: class '{unknown}' is not among the reference's {format_class_names(theirs)}"
    return ids[class_ids], ""
