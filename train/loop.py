"""The loop that both stages share: steps, log, samples, evaluation, the best weights, and states to resume from."""

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
from uni_instruct.progress import progress, silent
from uni_instruct.spec import ModelSpec
from uni_instruct.train.config import LoopConfig
from uni_instruct.train.monitoring.health import Health
from uni_instruct.train.monitoring.metrics import Metrics
from uni_instruct.train.monitoring.scores import MOST_REFERENCE_FOR_PR, SELECTION_METRICS, metric_value
from uni_instruct.train.optimization.distributed import gathered
from uni_instruct.train.optimization.ema import Averages
from uni_instruct.train.rng import step_rng
from uni_instruct.train.run import Run

# Far from the seeds that users evaluate with, so that the best weights are not chosen on the images they are reported on.
FIRST_SELECTION_SEED = 2**40
SAMPLE_BATCH = 128


class Stage(Protocol):
    """What is trained. A step must depend on its index, its random numbers and the state alone."""

    name: str
    batch: int
    total_steps: int
    evaluate_kimg: float
    averages: Averages[Any]

    @property
    def skipped(self) -> int:
        """Updates left out because they were not finite."""
        ...

    def step(self, index: int, rng: torch.Generator, log_details: bool) -> Metrics:
        """Trains on one batch; with `log_details`, returns scalars to log, the same in every process."""
        ...

    def sample(self, noise: Tensor, class_ids: ClassLabels | None) -> Tensor:
        """Images [B, C, H, W] in about [-1, 1] of the averaged weights."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a step reads and changes."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        ...


@dataclass
class Best:
    """The best evaluation so far: its scores, and the step after which it was made."""

    value: float = math.inf
    step: int = 0
    scores: dict[str, float] | None = None


class Loop:
    """Runs a stage from where its state stands to its end.

    keep is called, in the first process, with scores and images whenever the averaged weights are the best so far.
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
        """Trains to the end; raises KeyboardInterrupt after saving the state where the user interrupts."""
        first = self._resume(stage)
        # A run that is called again after its end has nothing to do here, and must not log or evaluate once more.
        if first == stage.total_steps:
            return self.best
        self.run.note_changes(stage.name, first)
        meter = _Meter(time.monotonic(), first)
        shows = progress(stage.name, stage.total_steps, "steps", done=first) if self._first else silent(stage.name, 0, "")
        clock = self.run.clock
        with _deferred_interrupt() as interrupted, shows as shown, clock.during(stage.name, "steps"):
            for index in range(first, stage.total_steps):
                done = index + 1
                # One for each step, not one that goes on: what was drawn before does not matter to a resumed run.
                rng = step_rng(self.config.seed, stage.name, index)
                torch.manual_seed(rng.initial_seed() + self.fabric.global_rank)  # dropout draws from the global one
                log_details = _due(stage, done, self.config.log_kimg)
                metrics = stage.step(index, rng, log_details)
                note = self._log(stage, done, metrics, meter) if log_details else None
                if self.run.snapshots and _due(stage, done, self.config.snapshot_kimg):
                    self._snapshot(stage, done)
                if _due(stage, done, stage.evaluate_kimg) and (done > 1 or done == stage.total_steps):
                    with clock.during(stage.name, "evaluation"):
                        note = self._evaluate(stage, done)
                shown.advance(1, note)
                # After the step, so that the state that is saved is that of a whole one.
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
    def _judged_by(self) -> list[str | int]:
        """What the best weights are chosen by: values of anything else cannot be compared."""
        return [self.config.metric, self.evaluator.extractor.name if self.evaluator else "", self.config.samples]

    def _anywhere(self, flag: bool) -> bool:
        """Whether the flag is up in any process: all of them have to stop at the same step."""
        # One process needs no collective, which on a GPU would wait for the step to end.
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
            if state.get("judged_by", self._judged_by) == self._judged_by:
                self.best = Best(**state["best"])  # else another measure would be held against it
            self.health.load_state_dict(state["health"])
        self.fabric.barrier()  # every process has read what the first is going to change
        # A killed run logged steps that no state remembers; they are going to be trained, and logged, again.
        if self._first:
            self.run.forget_log_after(stage.name, step if state is not None else -1)
        return step

    def _save(self, stage: Stage, done: int) -> None:
        if self._first:
            state = {
                "step": done,
                "best": dict(self.best.__dict__),
                "judged_by": self._judged_by,
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
        # Health is asked before speed and memory are added: those are the machine's, and no symptom may depend on them.
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
        note = self._judge(stage, done, images) if self._first else ""
        self.fabric.barrier()
        return note

    def _judge(self, stage: Stage, done: int, images: np.ndarray) -> str:
        kimg = done * stage.batch / 1000
        self.run.save_samples(stage.name, kimg, images[: self.config.grid])
        scores, value = {}, 0.0  # without a metric the last weights count
        if self.evaluator is not None:
            asked = SELECTION_METRICS[self.config.metric].asked
            # Precision and recall compare every pair of images of the reference: affordable for small ones alone.
            few = self.evaluator.reference_images <= MOST_REFERENCE_FOR_PR
            # Neither asks which class an image is of, and the data's classes may be others than the teacher's.
            scores = self.evaluator(images, metrics=(asked, "pr") if few else (asked,)).values
            value = metric_value(scores, self.config.metric)
            self.run.log(stage.name, done, kimg, scores)
        # Of equal scores the later one counts, and without a metric all are equal.
        if value <= self.best.value:
            self.best = Best(value, done, scores)
            self.keep(scores, images[: self.config.grid])
        share = f"{self.run.clock.share(stage.name, 'evaluation'):.0%} of the time went into evaluation"
        return ", ".join([*(f"{name} {score:.3f}" for name, score in scores.items()), share])

    def _draw(self, stage: Stage) -> np.ndarray:
        """The images to score, made by all processes together; the first has them, the others none."""
        count = self.config.samples if self.config.metric != "none" else self.config.grid
        seeds = range(FIRST_SELECTION_SEED, FIRST_SELECTION_SEED + count)
        # As in the data that it is to imitate: the best weights at other shares of the classes would be others.
        class_ids = draw_classes(self.spec, seeds, self.evaluator.reference if self.evaluator else None).class_ids
        class_ids = self.fabric.broadcast(class_ids)  # the first process alone knows the reference
        made = dict[int, np.ndarray]()
        shows = progress if self._first else silent
        with shows(f"{stage.name}: samples", count, "images") as shown:
            for number, inputs in enumerate(input_batches(self.spec, seeds, class_ids, SAMPLE_BATCH)):
                if number % self.fabric.world_size == self.fabric.global_rank:
                    made[number] = self._images(stage, inputs)
                shown.advance(len(inputs.noise))
        parts = {number: images for part in gathered(self.fabric, made) for number, images in part.items()}
        return np.concatenate([parts[number] for number in sorted(parts)]) if parts else np.empty(0)

    def _images(self, stage: Stage, inputs: Inputs) -> np.ndarray:
        device = next(stage.averages.primary.module.parameters()).device
        with self.fabric.autocast():  # choosing among weights needs no more digits than training them
            made = stage.sample(*as_tensors(inputs, device))
        return latent_preview(made.float().cpu().numpy()) if self.spec.latents else to_uint8(made).cpu().numpy()


def _due(stage: Stage, done: int, every_kimg: float) -> bool:
    # Whole batches: a stage whose batch is larger than the interval does it after each. The last step always counts.
    return done == stage.total_steps or done % max(1, round(every_kimg * 1000 / stage.batch)) == 0


@dataclass
class _Meter:
    """Speed since the last log line."""

    time_s: float
    step: int

    def steps_per_s(self, done: int) -> float:
        now = time.monotonic()
        # max: two lines within the clock's resolution.
        rate = (done - self.step) / max(now - self.time_s, 1e-9)
        self.time_s, self.step = now, done
        return rate


def _memory_mb() -> float:
    """The most memory that this process has held: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # Linux gives kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Lets a step finish before Ctrl-C or SIGTERM takes effect; a second Ctrl-C is immediate.

    Only in the main thread: a training in another one is told nothing, and ends with its process.
    """
    received = False
    if threading.current_thread() is not threading.main_thread():  # Python lets no other set what a signal does
        yield lambda: False
        return

    def receive(number: int, frame: FrameType | None) -> None:
        nonlocal received
        # Who asks twice does not want to wait for the step.
        if received:
            raise KeyboardInterrupt
        received = True

    # SIGTERM as well as Ctrl-C: it is what a scheduler sends before it kills.
    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
