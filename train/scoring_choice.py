"""Resolves loop.metric and `loop.extractor=auto` for a data set before training: how the best weights will be chosen."""

import dataclasses
import logging
from typing import NamedTuple

from uni_instruct.data import Dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate.classifier import MIN_IMAGES
from uni_instruct.evaluate.extractors import INCEPTION_DIM, INCEPTION_MIN_SIDE, inception_weights
from uni_instruct.system.processes import is_nonzero_rank
from uni_instruct.train.config import AUTO, LoopConfig

log = logging.getLogger(__name__)


class ScoringChoice(NamedTuple):
    """A LoopConfig whose metric and extractor are resolved, and one sentence that says how the best weights are chosen."""

    loop: LoopConfig
    words: str


def choose_scoring(loop: LoopConfig, dataset: Dataset | None) -> ScoringChoice:
    """Choose the feature extractor for scores against this data set. If it is InceptionV3, its weights are downloaded now.

    `auto` chooses InceptionV3 for colour images of at least 32 pixels a side, if the data has at least as many images as
    InceptionV3 has features. Otherwise it chooses a classifier trained on the data, if the data has classes and enough images.
    For fewer images without a classifier it chooses InceptionV3 if its weights are available, else metric none (the last
    weights are kept). Raises RequestError, with settings for `train` as remedy, if the requested extractor is not available.
    """
    if loop.metric == "none" or dataset is None:
        return ScoringChoice(loop, "no scores (loop.metric=none or no data): the last weights are kept")
    dataset.require_images()
    can_classify = dataset.num_classes > 1 and len(dataset) >= MIN_IMAGES
    if loop.extractor == "classifier" and not can_classify:
        raise RequestError(
            f"loop.extractor=classifier: data set '{dataset.name}' has {len(dataset)} images of {dataset.num_classes} classes",
            remedy=f"give {MIN_IMAGES} images of 2 classes or more, or --set metric=none",
            param="extractor",
        )
    channels, *sides = dataset.image_shape
    small = len(dataset) < INCEPTION_DIM
    suits = channels == 3 and min(sides) >= INCEPTION_MIN_SIDE and not small
    if loop.extractor == "classifier" or (loop.extractor == AUTO and can_classify and not suits):
        words = f"the best weights are chosen by a classifier of '{dataset.name}' itself (loop.extractor=classifier)"
        few = f", as {len(dataset):,} images are fewer than InceptionV3's {INCEPTION_DIM:,} features" if small else ""
        return ScoringChoice(dataclasses.replace(loop, extractor="classifier"), words + few)
    return _inception(loop, dataset, can_classify, small)


def announce(scoring: ScoringChoice, asked: LoopConfig) -> None:
    """Log one line if `auto` was resolved to anything but InceptionV3. Only rank 0 logs."""
    changed = scoring.loop.metric != asked.metric or (asked.extractor == AUTO and scoring.loop.extractor == "classifier")
    if changed and not is_nonzero_rank():
        log.warning("%s", scoring.words)


def announce_note(dataset: Dataset | None) -> None:
    """Log the note of the data set, such as its skipped files, before the training starts. Only rank 0 logs."""
    if dataset is not None and dataset.note and not is_nonzero_rank():
        log.warning("data set '%s': %s", dataset.name, dataset.note)


def _inception(loop: LoopConfig, dataset: Dataset, can_classify: bool, small: bool) -> ScoringChoice:
    chosen = dataclasses.replace(loop, extractor="inception")
    words = "the best weights are chosen by InceptionV3's features (loop.extractor=inception)"
    if is_nonzero_rank():  # rank 0 downloads the weights
        return ScoringChoice(chosen, words)
    try:
        inception_weights(", or --set extractor=classifier" if can_classify else ", or --set metric=none")
    except RequestError as error:
        if loop.extractor != AUTO or not small:
            raise
        otherwise = error.remedy.partition(", or")[0]
        words = (
            f"{len(dataset):,} images of {dataset.num_classes} classes cannot be scored, so the last weights "
            f"are kept (loop.metric=none): {error.problem}; {otherwise} to choose by InceptionV3"
        )
        return ScoringChoice(dataclasses.replace(loop, metric="none"), words)
    return ScoringChoice(chosen, words)
