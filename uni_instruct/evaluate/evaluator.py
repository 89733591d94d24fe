"""Evaluator: scores any number of image sets against one reference, whose features are computed once."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from uni_instruct.data import Dataset
from uni_instruct.data.concat import shape_remedy
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.evaluate.classifier_file import classifier_path
from uni_instruct.evaluate.extractors import (
    INCEPTION,
    PRETRAINED,
    Extractor,
    Features,
    choose_extractor,
    inception,
    open_classifier,
    pretrained,
)
from uni_instruct.evaluate.reference_cache import ReferenceCache, ReferenceFeatures
from uni_instruct.evaluate.scores import Available, Comparison, Scores, applicable, score
from uni_instruct.evaluate.statistics import Statistics, open_reference
from uni_instruct.evaluate.summary import KEPT_IMAGES, Summary, SummaryPlan, concatenate_parts, summarise_features
from uni_instruct.images import checked_images
from uni_instruct.spec import ImageShape
from uni_instruct.system.progress import Progress, ProgressFactory, silent

BATCH = 256
# All features of a reference stay in memory if they take at most REFERENCE_BYTES. _SHARD_IMAGES are summed up at once.
REFERENCE_BYTES, _FLOAT_BYTES, _SHARD_IMAGES = 2**29, 4, 1024


class Evaluator:
    """Scores images against a data set or its statistics.

    extractor: one of EXTRACTORS or PRETRAINED, or an Extractor. Statistics determine their extractor, so 'auto' fits them.
    with_progress: shows the progress of long work.

    Raises RequestError if the extractor is unknown or not available, or if the data set contains latents.
    """

    def __init__(
        self, reference: Dataset | Statistics, extractor: str | Extractor = "auto", with_progress: ProgressFactory = silent
    ):
        self.reference = reference
        if isinstance(reference, Statistics):
            self.extractor = _extractor_of(reference, extractor)
            self._all: np.ndarray | None = None
            self.kept: np.ndarray | None = None
            self.mu, self.sigma = reference.mu, reference.sigma
        else:
            reference.require_images()
            chosen = choose_extractor(extractor, reference, with_progress) if isinstance(extractor, str) else extractor
            self.extractor = chosen
            with with_progress(f"features of {reference.name}", len(reference), "images") as progress:
                self._read(reference, progress)

    def _read(self, reference: Dataset, progress: Progress) -> None:
        """Compute or load the reference's features and statistics. For a large reference only evenly spaced ones are kept."""
        known = ReferenceCache(reference, self.extractor)
        found = known.read()
        if found is None:
            plan = SummaryPlan(total=len(reference))
            parts = list[np.ndarray]()
            keeps_all = len(reference) * self.extractor.dim * _FLOAT_BYTES <= REFERENCE_BYTES
            summary: Summary | None = None
            for start in range(0, len(reference), _SHARD_IMAGES):
                indices = np.arange(start, min(start + _SHARD_IMAGES, len(reference)))
                features = self.extractor([reference.images(indices)])
                part = summarise_features(features, plan, start)
                parts.append(features.features.numpy() if keeps_all else part.kept[0])
                progress.advance(len(indices))
                if summary is None:
                    summary = part
                else:
                    summary.add(part)
            assert summary is not None  # a data set has images
            found = ReferenceFeatures(concatenate_parts(parts), *summary.moments())
            known.write(found)
        self._all = found.features if len(found.features) == len(reference) else None
        # Evenly spaced features, at most KEPT_IMAGES, for the metrics that compare single images.
        self.kept, self.mu, self.sigma = found.features[:: -(-len(found.features) // KEPT_IMAGES)], found.mu, found.sigma

    def check(self, metrics: Sequence[str] | None, images: int, has_class_ids: bool) -> None:
        """Raise RequestError for a metric that is unknown or cannot be measured. Call it before the images are made.

        images: how many will be scored. has_class_ids: whether their classes will be known.
        """
        self.asked(metrics, images, has_class_ids)

    def asked(self, metrics: Sequence[str] | None, images: int, has_class_ids: bool) -> list[str]:
        """The metrics that will be measured: those named, or all that apply. Arguments and errors as in `check`."""
        return applicable(metrics, Available(self.extractor, images, self.reference_images, has_class_ids))

    @property
    def features(self) -> Features | None:
        """The reference's features, without logits; None if it is statistics, or too large to keep all features."""
        import torch

        return None if self._all is None else Features(torch.from_numpy(self._all), torch.empty(len(self._all), 0))

    @property
    def required_shape(self) -> ImageShape | None:
        """The [C, H, W] that images must have; None if any shape is accepted."""
        return self.reference.image_shape if isinstance(self.reference, Dataset) else self.extractor.image_shape

    @property
    def reference_images(self) -> int:
        """The number of images in the reference; 0 if it is statistics."""
        return len(self.reference) if self.kept is not None else 0

    def __call__(self, images: np.ndarray, class_ids: np.ndarray | None = None, metrics: Sequence[str] | None = None) -> Scores:
        """Score images uint8 [N, H, W, C]; see `score_batches`."""
        images = checked_images(images)
        return self.score_batches((images[i : i + BATCH] for i in range(0, len(images), BATCH)), class_ids, metrics)

    def score_batches(
        self,
        batches: Iterable[np.ndarray],
        class_ids: np.ndarray | None = None,
        metrics: Sequence[str] | None = None,
    ) -> Scores:
        """Score images that are passed in batches uint8 [B, H, W, C]. Only their features are kept in memory.

        class_ids: int64 [N], the true class of each image in the reference's numbering.
        metrics: names from METRICS; by default all that apply.

        Raises RequestError for images whose shape is not the reference's, fewer than 4 images, floats in place of pixels, names
        in place of ids, or a metric that is unknown or does not apply.
        """
        if class_ids is not None:
            class_ids = np.asarray(class_ids)
            if class_ids.dtype.kind not in "iu" or class_ids.ndim != 1:
                problem = f"class ids are {class_ids.dtype} {list(class_ids.shape)}, not integers [N]"
                raise RequestError(problem, remedy="give an id for each image", param="class_ids")
            known = self.extractor.num_classes
            outside = class_ids[(class_ids < 0) | (class_ids >= known)] if known else class_ids[:0]
            if len(outside):
                raise RequestError(
                    f"class id {outside[0]} is outside 0..{known - 1}, the ids of the reference",
                    remedy="give ids in the reference's numbering, or leave class_ids out",
                    param="class_ids",
                )
        features = self.extractor(checked_batches(batches, self.required_shape))
        if class_ids is not None and len(class_ids) != len(features):
            raise RequestError(
                f"{len(class_ids)} class ids were given for {len(features)} images",
                remedy="give one for each image",
                param="class_ids",
            )
        wanted = metrics is None or "is" in metrics
        plan = SummaryPlan(total=len(features), with_scores=wanted and self.extractor.is_inception)
        return self.score_summary(summarise_features(features, plan, 0, class_ids), class_ids is not None, metrics)

    def score_summary(self, summary: Summary, has_class_ids: bool, metrics: Sequence[str] | None = None) -> Scores:
        """Score images from their summary. Raises RequestError for too few images and for metrics, as `score_batches` does."""
        comparison = Comparison(
            generated=summary, mu=self.mu, sigma=self.sigma, reference=self.kept, has_class_ids=has_class_ids
        )
        return score(self.extractor, comparison, metrics, self.reference.name)

    def statistics(self) -> Statistics:
        """The reference's mean and covariance. Later evaluations can use them in place of the reference."""
        return Statistics(
            name=self.reference.name,
            mu=self.mu,
            sigma=self.sigma,
            extractor=self.extractor.name,
            extractor_sha256=self.extractor.sha256,
            fingerprint=self.extractor.fingerprint,
            samples=len(self.reference),
        )


def evaluate_images(
    images: ArrayLike,
    reference: Dataset | Statistics | str | Path,
    class_ids: ArrayLike | None = None,
    *,
    metrics: Sequence[str] | None = None,
    extractor: str = "auto",
) -> Scores:
    """Score images uint8 [N, H, W, C] against a reference. The result has `values` by full name, and what they depend on.

    reference: a data set or statistics, or an argument of `--reference`: a name, folder, zip or file of statistics.
    class_ids: the true class of each image, in the reference's numbering.
    metrics, extractor: as `evaluate --help` lists them; by default all metrics that apply.

    Each call loads or computes the reference's features again. To score several sets, keep an
    `uni_instruct.evaluate.Evaluator`.
    Raises RequestError for floats in place of pixels, and for images that do not fit the reference.
    """
    pixels = checked_images(images)
    opened = open_reference(str(reference)) if isinstance(reference, str | Path) else reference
    if isinstance(opened, Dataset):
        check_shape((pixels.shape[3], *pixels.shape[1:3]), opened.image_shape)
    ids = None if class_ids is None else np.asarray(class_ids)
    return Evaluator(opened, extractor)(pixels, ids, metrics)


# Each batch is checked as it arrives, so that a wrong shape is reported at once and not after an hour of generating.
def checked_batches(batches: Iterable[np.ndarray], shape: ImageShape | None) -> Iterator[np.ndarray]:
    """Yield the batches unchanged. Raises RequestError at one that is not uint8 [B, H, W, C], or not of `shape` [C, H, W]."""
    for images in map(checked_images, batches):
        if shape is not None:
            check_shape((images.shape[3], *images.shape[1:3]), shape)
        yield images


def check_shape(shape: ImageShape, reference: ImageShape) -> None:
    """Raise RequestError unless images of shape [C, H, W] have the reference's shape."""
    if tuple(shape) != tuple(reference):
        raise RequestError(
            f"images of shape {list(shape)} cannot be compared with a reference of {list(reference)}",
            remedy=shape_remedy(shape, reference),
            param="reference",
        )


def _extractor_of(statistics: Statistics, asked: str | Extractor) -> Extractor:
    """The extractor that made the statistics. Raises RequestError if another one is requested, or it is not available."""
    # The features of two extractors are not comparable: a distance between them would be meaningless.
    if not isinstance(asked, str):
        return asked
    makers = {INCEPTION: "inception"} | {name: name for name in PRETRAINED}
    maker = makers.get(statistics.extractor, "classifier")
    if asked not in ("auto", maker):
        raise RequestError(
            f"the statistics of {statistics.name} were made by {statistics.extractor}, not by '{asked}'",
            remedy="use --extractor auto, or give the data set itself",
            param="extractor",
        )
    if maker == "inception":
        return inception()
    if maker in PRETRAINED:
        return pretrained(maker)
    remedy = "give the data set itself as --reference"
    try:
        extractor = open_classifier(classifier_path(statistics.fingerprint), statistics.extractor)
    except FileFormatError as error:
        raise RequestError(
            f"the classifier of the statistics, {statistics.extractor}, is not on this machine",
            remedy=remedy,
            param="reference",
        ) from error
    # A classifier that was trained on another machine has slightly different weights, so its features differ.
    if extractor.sha256 != statistics.extractor_sha256:
        raise RequestError(
            f"the statistics of {statistics.name} were made by a {statistics.extractor} with other weights than this machine's",
            remedy=remedy,
            param="reference",
        )
    return extractor
