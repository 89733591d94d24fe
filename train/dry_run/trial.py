"""Single steps of a plan's stages: counted on networks without storage (meta device), and timed on this machine."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.flops import count_flops
from uni_instruct.train.config import StageConfig
from uni_instruct.train.dry_run.counting import Counts, MetaAutocast, SavedTensors
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.objective.pairs import Pairs
from uni_instruct.train.optimization.distributed import single_process_fabric
from uni_instruct.train.optimization.optimizer import OptimizerStep
from uni_instruct.train.optimization.precision import arithmetic_of
from uni_instruct.train.plan import Plan
from uni_instruct.train.recipe_keys import KIMG
from uni_instruct.train.rng import initial_weights
from uni_instruct.train.stages.data_loader import DataLoader
from uni_instruct.train.stages.distillation import DistillationModels, DistillationStage
from uni_instruct.train.stages.teacher import TeacherStage

REWARD_IMAGES = 2  # the number of images on which `open_reward` tries a reward
GROWTH = 4  # factor of the number of images from one timed step to the next
_MEMINFO = Path("/proc/meminfo")


class StepCounter:
    """Counts a step of each stage, by running the training code's own step on the meta device."""

    def __init__(self, plan: Plan):
        self.plan = plan
        # Built with a strategy and accelerator of our own, because Fabric does not support the meta device.
        self.fabric = Fabric(strategy=SingleDeviceStrategy(torch.device("meta"), accelerator=_NoDevice()))
        self._counted: dict[tuple[ObjectiveConfig, bool], Counts] = {}

    def evaluation(self) -> float:
        """FLOPs of one evaluation of the teacher on one image."""
        with self.fabric.device:
            denoiser, inputs = build_denoiser(self.plan.teacher_spec), _inputs(self.plan)
            return count_flops(lambda: denoiser(*inputs))

    def teacher(self) -> Counts:
        """The counts of a step of the teacher's training."""
        stage = teacher_stage(self.plan, self.fabric, images=1)
        stage.optimizer_step = _GradientsOnly(stage.optimizer_step)
        return self._count(stage, [stage.optimizer_step.module])

    def distillation(self, objective: ObjectiveConfig, critic_alone: bool) -> Counts:
        """The counts of a step of the distillation.

        Only the last of the critic's updates is followed by one of the generator. Each of the others costs as much as a step
        of the warm-up, critic_alone.
        """
        counts, more = self._one_update(objective, critic_alone), objective.critic_updates - 1
        flops = counts.flops + (more * self._one_update(objective, critic_alone=True).flops if more else 0)
        if objective.reward_scale and not critic_alone:
            flops += self._reward()
        return Counts(flops=flops, activations=counts.activations)

    def _one_update(self, objective: ObjectiveConfig, critic_alone: bool) -> Counts:
        objective = dataclasses.replace(objective, critic_updates=1)
        if (objective, critic_alone) not in self._counted:
            plan = dataclasses.replace(self.plan, reward=lambda images, class_ids: images.mean(dim=(1, 2, 3)))
            stage = distillation_stage(plan, self.fabric, objective, critic_alone, images=1, stage_class=_CountedDistillation)
            networks = [stage.student.module, stage.critic.module, stage.update_student.teacher]
            self._counted[objective, critic_alone] = self._count(stage, networks)
        return self._counted[objective, critic_alone]

    def _reward(self) -> float:
        """FLOPs of the reward per image, with its gradient. Uses real tensors, since a user's function may contain networks."""
        assert self.plan.reward is not None
        reward, (images, _, class_ids) = self.plan.reward, _inputs(self.plan, REWARD_IMAGES)
        images.requires_grad_()
        return count_flops(lambda: torch.autograd.grad(reward(images, class_ids).sum(), images)) / REWARD_IMAGES

    def _count(self, stage: TeacherStage | DistillationStage, networks: Iterable[nn.Module]) -> Counts:
        saved = SavedTensors(networks)
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        with saved, MetaAutocast(self.plan.recipe.loop.precision, device_type, saved):
            flops = count_flops(lambda: stage.step(0, _rng(), False))
        return Counts(flops=flops / stage.batch, activations=saved.peak)  # the peak is per image: one image at once


class _NoDevice(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Do nothing: the meta device needs no setup."""


class _GradientsOnly(OptimizerStep):
    """An optimizer step without the update, which would read the values of gradients. On the meta device they have none."""

    def __init__(self, optimizer_step: OptimizerStep):
        self.__dict__.update(optimizer_step.__dict__)

    def step(self, index: int) -> Tensor:
        """Discard the gradients."""
        self.optimizer.zero_grad()
        return torch.zeros(())


class _CountedDistillation(DistillationStage):
    def _optimizer_step(self, module: nn.Module, name: str) -> OptimizerStep:
        return _GradientsOnly(super()._optimizer_step(module, name))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per image of a step, timed on `images` images. images 0: estimated from one evaluation of the teacher by FLOPs.

    peak_bytes is the GPU memory that the step needed, None on the CPU.
    """

    s_per_image: float
    images: int
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrialLimits:
    """Limits of timing a stage: most images at once, bytes without images, bytes per image, and seconds for measuring."""

    images: int
    fixed_bytes: int
    bytes_per_image: float
    budget_s: float


class StepTimer:
    """Times a step of each stage with random weights, on one GPU or on the CPU."""

    def __init__(self, plan: Plan, evaluation_flops: float, weights_bytes: int):
        asked = plan.recipe.loop.precision
        self.precision = "32-true" if asked == "16-mixed" and not torch.cuda.is_available() else asked
        self.plan, self.evaluation_flops, self.weights_bytes = plan, evaluation_flops, weights_bytes
        self.fabric = single_process_fabric(self.precision)

    @property
    def device(self) -> str:
        """The device and how it was used, as text."""
        on_gpu, threads, loop = self.fabric.device.type == "cuda", torch.get_num_threads(), self.plan.recipe.loop
        words = torch.cuda.get_device_name(self.fabric.device) if on_gpu else f"CPU, {threads} thread{'s' * (threads > 1)}"
        words += f", {self.precision}" + (f" as {loop.precision} needs a GPU" if self.precision != loop.precision else "")
        words += ", channels_last" if loop.channels_last is True else ""
        return words + (", not compiled" if loop.compile else "")

    def teacher(self, flops: float, limits: TrialLimits) -> Timing | None:
        """Time a step of the teacher's training. None if the memory is too small even for one evaluation."""
        return self._time(lambda images: teacher_stage(self.plan, self.fabric, images), flops, limits)

    def distillation(self, objective: ObjectiveConfig, critic_alone: bool, flops: float, limits: TrialLimits) -> Timing | None:
        """Time a step of the distillation. None if the memory is too small even for one evaluation."""
        return self._time(
            lambda images: distillation_stage(self.plan, self.fabric, objective, critic_alone, images), flops, limits
        )

    def _time(
        self, build: Callable[[int], TeacherStage | DistillationStage], flops: float, limits: TrialLimits
    ) -> Timing | None:
        """Time steps on more and more images at once, as far as half of the free memory and the budget allow."""
        if self.evaluation_s is None:
            return None
        # Only half of the free memory, because other programs may be using the machine.
        start, images, free = time.monotonic(), 1, _free_bytes(self.fabric.device) / 2
        # Seconds per image, estimated as: evaluation's seconds x step's FLOPs / evaluation's FLOPs.
        guess_s = self.evaluation_s * flops / self.evaluation_flops
        room = (free - limits.fixed_bytes) / limits.bytes_per_image
        if room < 1 or GROWTH * guess_s > limits.budget_s:
            return Timing(s_per_image=guess_s, images=0)
        while True:
            before = time.monotonic()
            timing = self._measure(build(images))
            now = time.monotonic()
            more = int(min(limits.images, room, GROWTH * images))
            # A step on GROWTH times as many images is assumed to take GROWTH times as long.
            if more <= images or now - start + GROWTH * (now - before) > limits.budget_s:
                return timing
            images = more

    def _measure(self, stage: TeacherStage | DistillationStage) -> Timing:
        on_gpu = self.fabric.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        step_s = self._twice_s(lambda: stage.step(0, _rng(), False))[1]
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        return Timing(s_per_image=step_s / stage.batch, images=stage.batch, peak_bytes=peak)

    @cached_property
    def evaluation_s(self) -> float | None:
        """Seconds of one evaluation of the teacher on one image; None if its weights need over half of the free memory."""
        if self.weights_bytes > _free_bytes(self.fabric.device) / 2:
            return None
        with self.fabric.device:
            denoiser, inputs = build_denoiser(self.plan.teacher_spec).eval(), _inputs(self.plan)
        network = self.fabric.setup_module(denoiser)
        with torch.no_grad():
            return self._twice_s(lambda: network(*inputs))[1]

    def _twice_s(self, work: Callable[[], object]) -> tuple[float, float]:
        """Run the work twice. Returns the seconds of the first and of the second run."""
        times = []
        # The first run compiles kernels and fills caches. Only the second is a measurement.
        for _ in range(2):
            start = time.perf_counter()
            with arithmetic_of(self.precision):
                work()
            if self.fabric.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return times[0], times[1]


def micro_batch_of(config: StageConfig) -> int:
    """The number of images that a single process computes at once."""
    return min(config.micro_batch or config.batch, config.batch)


def teacher_stage(plan: Plan, fabric: Fabric, images: int) -> TeacherStage:
    """The teacher's training with random weights. A step computes `images` images at once."""
    assert plan.dataset is not None
    config, loop = _with_micro_batch(plan.recipe.teacher, images), dataclasses.replace(plan.recipe.loop, compile=False)
    recipe = dataclasses.replace(plan.recipe, teacher=config, loop=loop)
    with fabric.device:
        denoiser = initial_weights(lambda: build_denoiser(plan.teacher_spec), loop.seed)
    return TeacherStage(denoiser, DataLoader(plan.dataset, config.batch, loop.seed), recipe, fabric)


def distillation_stage(
    plan: Plan,
    fabric: Fabric,
    objective: ObjectiveConfig,
    critic_alone: bool,
    images: int,
    stage_class: type[DistillationStage] = DistillationStage,
) -> DistillationStage:
    """The distillation with random weights and one objective. A step computes `images` images at once.

    critic_alone: all steps belong to the critic's warm-up; otherwise there is no warm-up.
    """
    # The longest possible duration, so that step 0 is within the warm-up whatever the batch.
    warmup_kimg = KIMG.high / 2 if critic_alone else 0.0
    config = dataclasses.replace(
        _with_micro_batch(plan.recipe.distillation, images), duration_kimg=KIMG.high, critic_warmup_kimg=warmup_kimg
    )
    loop = dataclasses.replace(plan.recipe.loop, compile=False)
    recipe = dataclasses.replace(plan.recipe, objective=objective, schedule=(), distillation=config, loop=loop)
    batches = None
    if plan.recipe.needs_discriminator:  # it is trained in every phase, if any phase needs it
        assert plan.dataset is not None
        batches = DataLoader(plan.dataset, config.batch, loop.seed)
    with fabric.device:
        teacher = initial_weights(lambda: build_denoiser(plan.teacher_spec), loop.seed)
    models = DistillationModels.from_teacher(teacher, plan.recipe)
    models.critic.to(fabric.device)
    pair, _, class_ids = _inputs(plan)
    return stage_class(models, recipe, fabric, batches, plan.reward, Pairs(noise=pair, images=pair, class_ids=class_ids))


Config = TypeVar("Config", bound=StageConfig)


def _with_micro_batch(config: Config, images: int) -> Config:
    """The config with steps on that many images at once: in one micro-batch, or in two if the recipe uses several."""
    # Two, because summing gradients over micro-batches has a cost; more than two would not change the cost per image.
    passes = 2 if micro_batch_of(config) < config.batch else 1
    return dataclasses.replace(config, batch=images * passes, micro_batch=images)


def _inputs(plan: Plan, images: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    """Grey images, noise levels of 1, and class ids (None without classes)."""
    spec = plan.teacher_spec
    class_ids = torch.zeros(images, dtype=torch.int64) if spec.num_classes else None
    return torch.zeros(images, *spec.noise_shape), torch.ones(images, 1, 1, 1), class_ids


def _rng() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _free_bytes(device: torch.device) -> float:
    """Available memory of the device in bytes; infinite if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else []
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)
