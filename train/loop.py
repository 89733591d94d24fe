"""The training loop of both stages: steps, log, samples, evaluation, the best weights, and saved states."""

import math
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from uni_instruct.evaluate import Evaluator
from uni_instruct.evaluate.class_draw import draw_classes
from uni_instruct.generate import input_batches
from uni_instruct.images import latent_preview
from uni_instruct.networks.denoiser import ClassLabels
from uni_instruct.networks.one_step import as_tensors, to_uint8
from uni_instruct.noise import Inputs
from uni_instruct.spec import ModelSpec
from uni_instruct.system.progress import progress, silent
from uni_instruct.train.config import LoopConfig
from uni_instruct.train.monitoring.health import Health
from uni_instruct.train.monitoring.metrics import Metrics
from uni_instruct.train.monitoring.scores import SELECTION_METRICS, affords_pr, metric_value
from uni_instruct.train.optimization.distributed import gather_to_first
from uni_instruct.train.optimization.ema import Averages
from uni_instruct.train.rng import step_rng
from uni_instruct.train.run import Run

# Far from the seeds that users evaluate with, so that weights are not chosen on the images that they are reported on.
FIRST_SELECTION_SEED = 2**40
SAMPLE_BATCH = 128


class Stage(Protocol):
    """What the loop trains. A step must depend only on its index, its random numbers and the state."""

    name: str
    batch: int
    total_steps: int
    evaluate_kimg: float
    averages: Averages[Any]

    @property
    def skipped(self) -> int:
        """Number of updates skipped because their gradient was not finite."""
        ...

    def step(self, index: int, rng: torch.Generator, log_details: bool) -> Metrics:
        """Train on one batch. With log_details, returns scalars to log, which are the same in every process."""
        ...

    def sample(self, noise: Tensor, class_ids: ClassLabels | None) -> Tensor:
        """Images [B, C, H, W] in about [-1, 1], made with the averaged weights."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step reads and changes."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


@dataclass
class Best:
    """The best evaluation so far: the value of the metric, the step after which it was made, and all scores."""

    value: float = math.inf
    step: int = 0
    scores: dict[str, float] | None = None


class Loop:
    """Trains a stage from its saved state, or from the start, to its end.

    keep(scores, images) is called in the first process whenever the averaged weights are the best so far.
    """

    def __init__(
        self,
        run: Run,
        config: LoopConfig,
        fabric: Fabric,
        spec: ModelSpec,
        evaluator: Evaluator | None,
        keep: Callable[[dict[str, float], np.ndarray], None],
    ):
        self.run, self.config, self.fabric, self.spec = run, config, fabric, spec
        self.evaluator, self.keep = evaluator, keep
        self.best, self.health = Best(), Health(config.warn_after_lines)

    def __call__(self, stage: Stage) -> Best:
        """Train to the end. Returns the best evaluation. An interrupt saves the state, then raises KeyboardInterrupt."""
        first = self._resume(stage)
        # A finished stage must not be logged or evaluated again.
        if first == stage.total_steps:
            return self.best
        self.run.note_changes(stage.name, first)
        meter = _Meter(time.monotonic(), first)
        shows = progress(stage.name, stage.total_steps, "steps", done=first) if self._first else silent(stage.name, 0, "")
        clock = self.run.clock
        with _deferred_interrupt() as interrupted, shows as shown, clock.during(stage.name, "steps"):
            for index in range(first, stage.total_steps):
                done = index + 1
                # A new generator for each step, so that a resumed run does not depend on earlier draws.
                rng = step_rng(self.config.seed, stage.name, index)
                torch.manual_seed(rng.initial_seed() + self.fabric.global_rank)  # dropout uses the global generator
                log_details = _due(stage, done, self.config.log_kimg)
                metrics = stage.step(index, rng, log_details)
                note = self._log(stage, done, metrics, meter) if log_details else None
                if self.run.snapshots and _due(stage, done, self.config.snapshot_kimg):
                    self._snapshot(stage, done)
                if _due(stage, done, stage.evaluate_kimg) and (done > 1 or done == stage.total_steps):
                    with clock.during(stage.name, "evaluation"):
                        note = self._evaluate(stage, done)
                shown.advance(1, note)
                # After the step, so that a saved state never contains half of a step.
                stop = self._anywhere(interrupted())
                if stop or _due(stage, done, self.config.state_kimg):
                    with clock.during(stage.name, "saving"):
                        self._save(stage, done)
                if stop:
                    raise KeyboardInterrupt
        return self.best

    @property
    def _first(self) -> bool:
        return self.fabric.is_global_zero

    @property
    def _scoring_settings(self) -> list[str | int]:
        """Metric, extractor and number of samples. Only scores with equal values of these can be compared."""
        return [self.config.metric, self.evaluator.extractor.name if self.evaluator else "", self.config.samples]

    def _anywhere(self, flag: bool) -> bool:
        """Whether the flag is set in any process. All processes have to stop after the same step."""
        # A single process needs no all-reduce, which on a GPU would wait for the step to end.
        if self.fabric.world_size == 1:
            return flag
        total = self.fabric.all_reduce(torch.tensor(float(flag), device=self.fabric.device), reduce_op="sum")
        return bool(total)

    def _resume(self, stage: Stage) -> int:
        state = self.run.load_state(stage.name)
        step = 0
        if state is not None:
            stage.load_state_dict(state["stage"])
            step = int(state["step"])
            if state.get("judged_by", self._scoring_settings) == self._scoring_settings:
                self.best = Best(**state["best"])  # otherwise the old best is forgotten, as its score cannot be compared
            self.health.load_state_dict(state["health"])
        self.fabric.barrier()  # every process has read the files that the first process changes next
        # A killed run may have logged steps after its last saved state. They will be trained and logged again.
        if self._first:
            self.run.remove_log_after(stage.name, step if state is not None else -1)
        return step

    def _save(self, stage: Stage, done: int) -> None:
        if self._first:
            state = {
                "step": done,
                "best": dict(self.best.__dict__),
                "judged_by": self._scoring_settings,
                "health": self.health.state_dict(),
                "stage": stage.state_dict(),
            }
            self.run.save_state(stage.name, state)
        self.fabric.barrier()

    def _snapshot(self, stage: Stage, done: int) -> None:
        if self._first:
            self.run.save_snapshots(stage.name, done * stage.batch / 1000, stage.averages)

    def _log(self, stage: Stage, done: int, metrics: Metrics, meter: "_Meter") -> str:
        values = {name: float(value) for name, value in metrics.items()}
        # Symptoms are checked before speed and memory are added, because they must not depend on the machine.
        values["skipped_steps"] = stage.skipped
        warnings = self.health.examine(values)
        values["images_per_s"] = meter.steps_per_s(done) * stage.batch
        values["memory_mb"] = _memory_mb()
        if self._first:
            self.run.log(stage.name, done, done * stage.batch / 1000, values)
            for warning in warnings:
                self.run.warn(stage.name, done, warning)
        return ", ".join(f"{name.rpartition('/')[2]} {value:.3g}" for name, value in list(values.items())[:1])

    def _evaluate(self, stage: Stage, done: int) -> str:
        images = self._draw(stage)
        note = self._score_images(stage, done, images) if self._first else ""
        self.fabric.barrier()
        return note

    def _score_images(self, stage: Stage, done: int, images: np.ndarray) -> str:
        kimg = done * stage.batch / 1000
        self.run.save_samples(stage.name, kimg, images[: self.config.grid])
        scores, value = {}, 0.0  # without a metric all values are equal, and the last weights are kept
        if self.evaluator is not None:
            asked = SELECTION_METRICS[self.config.metric].asked
            # Precision and recall compare all pairs of reference images, which takes too long for large references.
            few = affords_pr(self.evaluator.reference_images)
            # Neither metric needs the images' classes, and the data's classes may differ from the teacher's.
            scores = self.evaluator(images, metrics=(asked, "pr") if few else (asked,)).values
            value = metric_value(scores, self.config.metric)
            self.run.log(stage.name, done, kimg, scores)
        # <=, so that among equal scores the latest weights are kept.
        if value <= self.best.value:
            self.best = Best(value, done, scores)
            self.keep(scores, images[: self.config.grid])
        share = f"{self.run.clock.share(stage.name, 'evaluation'):.0%} of the stage's time was evaluation"
        return ", ".join([*(f"{name} {score:.3f}" for name, score in scores.items()), share])

    def _draw(self, stage: Stage) -> np.ndarray:
        """Images to score. All processes generate them; only the first process gets them."""
        count = self.config.samples if self.config.metric != "none" else self.config.grid
        seeds = range(FIRST_SELECTION_SEED, FIRST_SELECTION_SEED + count)
        # Classes are drawn with the data's frequencies, because a score, and so the best weights, depends on them.
        class_ids = draw_classes(self.spec, seeds, self.evaluator.reference if self.evaluator else None).class_ids
        class_ids = self.fabric.broadcast(class_ids)  # only the first process has the reference
        made = dict[int, np.ndarray]()
        shows = progress if self._first else silent
        with shows(f"{stage.name}: samples", count, "images") as shown:
            for number, inputs in enumerate(input_batches(self.spec, seeds, class_ids, SAMPLE_BATCH)):
                if number % self.fabric.world_size == self.fabric.global_rank:
                    made[number] = self._images(stage, inputs)
                shown.advance(len(inputs.noise))
        parts = {number: images for part in gather_to_first(self.fabric, made) for number, images in part.items()}
        return np.concatenate([parts[number] for number in sorted(parts)]) if parts else np.empty(0)

    def _images(self, stage: Stage, inputs: Inputs) -> np.ndarray:
        device = next(stage.averages.primary.module.parameters()).device
        with self.fabric.autocast():  # the precision of training is sufficient for choosing weights
            made = stage.sample(*as_tensors(inputs, device))
        return latent_preview(made.float().cpu().numpy()) if self.spec.latents else to_uint8(made).cpu().numpy()


def _due(stage: Stage, done: int, every_kimg: float) -> bool:
    # The interval is rounded to whole batches, at least one. The last step is always due.
    return done == stage.total_steps or done % max(1, round(every_kimg * 1000 / stage.batch)) == 0


@dataclass
class _Meter:
    """Measures the speed since the last log line: steps / seconds."""

    time_s: float
    step: int

    def steps_per_s(self, done: int) -> float:
        now = time.monotonic()
        # max, because two lines may fall within the clock's resolution.
        rate = (done - self.step) / max(now - self.time_s, 1e-9)
        self.time_s, self.step = now, done
        return rate


def _memory_mb() -> float:
    """Peak memory of this process in MB (2^20 bytes): of the GPU if there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # Linux reports kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the current step finish before Ctrl-C or SIGTERM takes effect. A second signal takes effect immediately.

    Works in the main thread only. A training in another thread gets no signal and ends with its process.
    """
    received = False
    if threading.current_thread() is not threading.main_thread():  # Python sets signal handlers in the main thread only
        yield lambda: False
        return

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal received
        # The second signal: the user does not want to wait for the step.
        if received:
            raise KeyboardInterrupt
        received = True

    # SIGTERM as well as Ctrl-C, because a scheduler sends it before it kills a process.
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
