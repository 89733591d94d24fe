"""Score many images shard by shard, in this process or in workers. No image is stored."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from uni_instruct.evaluate.evaluator import Evaluator, checked_batches
from uni_instruct.evaluate.extractors import Extractor, ExtractorFile
from uni_instruct.evaluate.image_sources import BundleImages, DatasetImages, ReadTask
from uni_instruct.evaluate.sample_source import SampleSource
from uni_instruct.evaluate.scores import Scores
from uni_instruct.evaluate.summary import Summary, SummaryPlan, summarise_features
from uni_instruct.sampling.pool import Pool, Task
from uni_instruct.sampling.shards import SHARD_IMAGES, Shard
from uni_instruct.sampling.workers import WorkerOptions
from uni_instruct.spec import ImageShape
from uni_instruct.system.processes import keep_freed_memory
from uni_instruct.system.progress import Progress, ProgressFactory

# Features are computed in batches of this size. Shards of whole batches make the same bits as all images in one go.
EXTRACTOR_BATCH = 64
# The most summaries in progress or waiting for an earlier one: each has D^2 numbers.
_WAITING = 16
# A shard has at most 1/_LEFT of the remaining images.
_LEFT = 16
_POLL_INTERVAL_S = 0.2
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SummaryJob:
    """The job of workers that summarise tasks; see `sampling.pool.WorkerJob`."""

    images: BundleImages | DatasetImages
    extractor: ExtractorFile
    plan: SummaryPlan
    shape: ImageShape | None

    def open(self) -> Callable[[Task], Summary]:
        """Open the images' source and the extractor; return the function from a task to its summary."""
        keep_freed_memory()  # without it a third of the features' time goes into mapping memory again for each batch
        return _summariser(self.images.open(alone=False), self.extractor.open(), self.plan, self.shape)

    def paths(self) -> list[Path]:
        """The paths of the images' source, and the extractor's weights."""
        return [*self.images.paths(), self.extractor.path]

    def with_paths(self, places: Mapping[Path, Path]) -> "SummaryJob":
        """See WorkerJob."""
        path = places.get(self.extractor.path, self.extractor.path)
        return replace(self, images=self.images.with_paths(places), extractor=replace(self.extractor, path=path))


def measure(
    evaluator: Evaluator,
    sources: Sequence[SampleSource],
    metrics: Sequence[str] | None,
    workers: WorkerOptions,
    with_progress: ProgressFactory,
    label: str,
) -> list[Scores]:
    """Score sources that differ only in their seeds. All share one progress display and one set of workers.

    The scores do not depend on the workers: shards are fixed, and their sums are added in order.
    """
    first, total = sources[0], sum(source.count for source in sources)
    wants_scores = "is" in evaluator.asked(metrics, first.count, first.expected is not None)
    plan = SummaryPlan(total=first.count, with_scores=wants_scores)
    with with_progress(label, total, "images") as progress:
        if not workers.wanted:
            read = _shown(first.images.open(alone=True), progress)
            make = _summariser(read, evaluator.extractor, plan, evaluator.required_shape)
            summaries = [_added(map(make, _tasks(source, first.images.batch))) for source in sources]
        else:
            job = SummaryJob(
                images=replace(first.images, opened=None) if isinstance(first.images, DatasetImages) else first.images,
                extractor=evaluator.extractor.required_file(),
                plan=plan,
                shape=evaluator.required_shape,
            )
            with workers.pool(job) as pool:
                summaries = [_added(in_order(pool, _tasks(source, first.images.batch), progress)) for source in sources]
    return [
        evaluator.score_summary(summary, source.expected is not None, metrics)
        for summary, source in zip(summaries, sources, strict=True)
    ]


def in_order(pool: Pool[T], tasks: Iterable[Task], progress: Progress) -> Iterator[T]:
    """Yield the tasks' results in the order of the tasks, computed by the pool's workers."""
    left, waiting, due = iter(tasks), dict[int, T](), list[Shard]()
    more = True
    while more or due:
        while more and pool.idle and len(due) < _WAITING:
            task = next(left, None)
            if task is None:
                more = False
            else:
                due.append(task.shard)
                pool.submit(task)
        for shard, result in pool.wait(_POLL_INTERVAL_S) if due or more else []:
            waiting[shard.start] = result
            progress.advance(len(shard))
        while due and due[0].start in waiting:
            yield waiting.pop(due.pop(0).start)


def shards_of(count: int, batch: int) -> Iterator[Shard]:
    """The shards of `count` images. They get smaller towards the end, so that the last one does not keep other workers waiting.

    They depend on the number of images and the batch size, never on the workers.
    """
    # A shard has whole batches of the engine. It has whole batches of the extractor too, unless that would make it too large.
    unit, start = math.lcm(batch, EXTRACTOR_BATCH), 0
    unit = unit if unit <= 4 * SHARD_IMAGES else batch
    while start < count:
        size = max(1, min(SHARD_IMAGES // unit, (count - start) // (_LEFT * unit))) * unit
        yield Shard(start, min(start + size, count))
        start += size


def _tasks(source: SampleSource, batch: int) -> Iterator[Task]:
    for shard in shards_of(source.count, batch):
        class_ids = None if source.class_ids is None else source.class_ids[shard.rows]
        expected = None if source.expected is None else source.expected[shard.rows]
        yield Task(shard, source.seeds[shard.rows], class_ids, expected)


def _summariser(read: ReadTask, extractor: Extractor, plan: SummaryPlan, shape: ImageShape | None) -> Callable[[Task], Summary]:
    splits = plan.splits() if plan.with_scores else None

    def summarise(task: Task) -> Summary:
        features = extractor(checked_batches(read(task), shape))
        return summarise_features(features, plan, task.shard.start, task.expected, splits)

    return summarise


def _added(summaries: Iterator[Summary]) -> Summary:
    total = next(summaries).owned()
    for summary in summaries:
        total.add(summary.owned())
    return total


def _shown(read: ReadTask, progress: Progress) -> ReadTask:
    def with_progress(task: Task) -> Iterator[np.ndarray]:
        for images in read(task):
            yield images
            progress.advance(len(images))

    return with_progress
