"""By whose features the best weights are chosen: what `loop.extractor=auto` comes to for the data, tried before training."""

import dataclasses
import logging
from typing import NamedTuple

from uni_instruct.data import Dataset
from uni_instruct.errors import RequestError
from uni_instruct.evaluate.classifier import MIN_IMAGES
from uni_instruct.evaluate.extractors import INCEPTION_DIM, INCEPTION_MIN_SIDE, inception_weights
from uni_instruct.processes import is_later_process
from uni_instruct.train.config import AUTO, LoopConfig

log = logging.getLogger(__name__)


class Judge(NamedTuple):
    """A loop's metric and extractor with nothing left to choose, and why, where `auto` was not the usual one."""

    loop: LoopConfig
    words: str


def choose_judge(loop: LoopConfig, dataset: Dataset | None) -> Judge:
    """What compares the generated images with these data. InceptionV3's weights are fetched where it is that.

    auto: for colour from 32 pixels on and at least as many images as InceptionV3 has features, InceptionV3; else, with classes,
    a classifier of the data's own. Small data without classes are scored where the weights can be had, else the last weights
    are kept. Raises RequestError, with settings that train takes, where what is asked for cannot be had.
    """
    if loop.metric == "none" or dataset is None:
        return Judge(loop, "nothing is scored: the last weights are kept")
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
        return Judge(dataclasses.replace(loop, extractor="classifier"), words + few)
    return _inception(loop, dataset, can_classify, small)


def announce(judge: Judge, asked: LoopConfig) -> None:
    """One line where `auto` was answered with anything but InceptionV3."""
    changed = judge.loop.metric != asked.metric or (asked.extractor == AUTO and judge.loop.extractor == "classifier")
    if changed and not is_later_process():
        log.warning("%s", judge.words)


def announce_note(dataset: Dataset | None) -> None:
    """What a user should know about the data, as what was passed over: before a training of hours, and not in a report."""
    if dataset is not None and dataset.note and not is_later_process():
        log.warning("data set '%s': %s", dataset.name, dataset.note)


def _inception(loop: LoopConfig, dataset: Dataset, can_classify: bool, small: bool) -> Judge:
    chosen = dataclasses.replace(loop, extractor="inception")
    words = "the best weights are chosen by InceptionV3's features (loop.extractor=inception)"
    if is_later_process():  # the first one fetches
        return Judge(chosen, words)
    try:
        inception_weights(", or --set extractor=classifier" if can_classify else ", or --set metric=none")
    except RequestError as error:
        if loop.extractor != AUTO or not small:
            raise
        otherwise = error.remedy.partition(", or")[0]
        words = (
            f"{len(dataset):,} images of {dataset.num_classes} classes are scored by nothing that is at hand, so the last "
            f"weights are kept (loop.metric=none): {error.problem}; {otherwise} to choose by InceptionV3"
        )
        return Judge(dataclasses.replace(loop, metric="none"), words)
    return Judge(chosen, words)
