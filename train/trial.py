"""Single steps of a plan's stages: counted on networks that have shapes but no storage, and timed on this machine."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators import CPUAccelerator
from lightning_fabric.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from uni_instruct.networks.build import build_denoiser
from uni_instruct.train.config import DistillationConfig, TeacherConfig
from uni_instruct.train.counting import Counts, MixedPrecision, SavedTensors, count_flops
from uni_instruct.train.distillation import DistillationStage, Players
from uni_instruct.train.objective_config import ObjectiveConfig
from uni_instruct.train.optimizing import Optimization
from uni_instruct.train.pairs import Pairs
from uni_instruct.train.parallel import start_fabric
from uni_instruct.train.plan import Plan
from uni_instruct.train.randomness import Batches, initial_weights
from uni_instruct.train.teacher import TeacherStage

REWARD_IMAGES = 2  # as many as a reward is tried on when it is opened
_MEMINFO = Path("/proc/meminfo")


class CountedSteps:
    """Counts a step of each stage: the training code's own, on the meta device."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.fabric = Fabric(strategy=SingleDeviceStrategy(torch.device("meta"), accelerator=_NoDevice()))

    def evaluation(self) -> float:
        """FLOPs of one image's way through the teacher."""
        with self.fabric.device:
            denoiser, inputs = build_denoiser(self.plan.teacher_spec), _inputs(self.plan)
            return count_flops(lambda: denoiser(*inputs))

    def teacher(self) -> Counts:
        """A step of the teacher's training."""
        stage = _teacher_stage(self.plan, self.fabric, images=1)
        stage.denoiser = _Unstepped(stage.denoiser)
        return self._count(stage, [stage.denoiser.module])

    def distillation(self, objective: ObjectiveConfig, critic_alone: bool) -> Counts:
        """A step of the distillation. All updates of the critic but the last are such that no generator's follows."""
        counts, more = self._one_update(objective, critic_alone), objective.critic_updates - 1
        flops = counts.flops + (more * self._one_update(objective, critic_alone=True).flops if more else 0)
        if objective.reward_scale and not critic_alone:
            flops += self._reward()
        return Counts(flops=flops, activations=counts.activations)

    def _one_update(self, objective: ObjectiveConfig, critic_alone: bool) -> Counts:
        objective = dataclasses.replace(objective, critic_updates=1)
        plan = dataclasses.replace(self.plan, reward=lambda images, class_ids: images.mean(dim=(1, 2, 3)))
        stage = _distillation_stage(plan, self.fabric, objective, critic_alone, images=1, kind=_CountedDistillation)
        return self._count(stage, [stage.generator.module, stage.critic.module, stage.update_generator.teacher])

    def _reward(self) -> float:
        """FLOPs an image. The function is the user's own and may hold networks of its own: it gets real images."""
        assert self.plan.reward is not None
        reward, (images, _, class_ids) = self.plan.reward, _inputs(self.plan, REWARD_IMAGES)
        images.requires_grad_()
        return count_flops(lambda: torch.autograd.grad(reward(images, class_ids).sum(), images)) / REWARD_IMAGES

    def _count(self, stage: TeacherStage | DistillationStage, networks: Iterable[nn.Module]) -> Counts:
        saved = SavedTensors(networks)
        with saved, MixedPrecision(self.plan.recipe.loop.precision, saved):
            flops = count_flops(lambda: stage.step(0, _generator(), False))
        return Counts(flops=flops / stage.batch, activations=saved.peak)  # one image at once


class _NoDevice(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """There is none to set up."""


class _Unstepped(Optimization):
    """Gradients only: a step would look at their values."""

    def __init__(self, optimization: Optimization):
        self.__dict__.update(optimization.__dict__)

    def step(self, index: int) -> Tensor:
        """Forgets the gradients."""
        self.optimizer.zero_grad()
        return torch.zeros(())


class _CountedDistillation(DistillationStage):
    def _optimization(self, module: nn.Module, name: str) -> Optimization:
        return _Unstepped(super()._optimization(module, name))


@dataclass(frozen=True, kw_only=True)
class Timing:
    """s_per_image of a timed step on that many images. With images 0 one evaluation of the teacher was timed instead, because
    a step would take too long, and scaled by FLOPs. peak_bytes is the GPU memory that the step took, None on the CPU.
    """

    s_per_image: float
    images: int
    peak_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """images at once that a stage may take; its bytes without activations, those of an image; and the time to measure in."""

    images: int
    fixed_bytes: int
    bytes_per_image: float
    budget_s: float


class TimedSteps:
    """Times a step of each stage with random weights, on one GPU or on the CPU."""

    def __init__(self, plan: Plan, evaluation_flops: float):
        precision, on_gpu = plan.recipe.loop.precision, torch.cuda.is_available()
        self.plan, self.evaluation_flops = plan, evaluation_flops
        self.fabric = start_fabric(1, "32-true" if precision == "16-mixed" and not on_gpu else precision)

    @property
    def device(self) -> str:
        """The machine, in words."""
        if self.fabric.device.type == "cuda":
            return torch.cuda.get_device_name(self.fabric.device)
        return f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"

    def teacher(self, flops: float, limits: Limits) -> Timing | None:
        """A step of the teacher's training; None where memory does not allow it."""
        return self._time(lambda images: _teacher_stage(self.plan, self.fabric, images), flops, limits)

    def distillation(self, objective: ObjectiveConfig, critic_alone: bool, flops: float, limits: Limits) -> Timing | None:
        """A step of the distillation; None where memory does not allow it."""
        return self._time(
            lambda images: _distillation_stage(self.plan, self.fabric, objective, critic_alone, images), flops, limits
        )

    def _time(self, build: Callable[[int], TeacherStage | DistillationStage], flops: float, limits: Limits) -> Timing | None:
        """After a step to warm up, on as many images as half of the free memory and a quarter of the time allow."""
        room = (_free_bytes(self.fabric.device) / 2 - limits.fixed_bytes) / limits.bytes_per_image
        if room < 1:
            return None
        guess_s = self._evaluation_s() * flops / self.evaluation_flops
        if 4 * guess_s > limits.budget_s:
            return Timing(s_per_image=guess_s, images=0)
        _, one_s = self._steps_s(build(1))
        stage = build(max(1, int(min(limits.images, room, limits.budget_s / 4 / one_s))))
        on_gpu = self.fabric.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        _, step_s = self._steps_s(stage)
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        return Timing(s_per_image=step_s / stage.batch, images=stage.batch, peak_bytes=peak)

    def _evaluation_s(self) -> float:
        with self.fabric.device:
            denoiser, inputs = build_denoiser(self.plan.teacher_spec).eval(), _inputs(self.plan)
        network = self.fabric.setup_module(denoiser)
        with torch.no_grad():
            return self._twice_s(lambda: network(*inputs))[1]

    def _steps_s(self, stage: TeacherStage | DistillationStage) -> tuple[float, float]:
        return self._twice_s(lambda: stage.step(0, _generator(), False))

    def _twice_s(self, work: Callable[[], object]) -> tuple[float, float]:
        """How long it took, first and second time."""
        times = []
        for _ in range(2):
            start = time.perf_counter()
            work()
            if self.fabric.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return times[0], times[1]


def micro_batch_of(config: TeacherConfig | DistillationConfig) -> int:
    """The most images that one process, alone, takes at once."""
    return min(config.micro_batch or config.batch, config.batch)


def _teacher_stage(plan: Plan, fabric: Fabric, images: int) -> TeacherStage:
    assert plan.dataset is not None
    config, loop = _taking(plan.recipe.teacher, images), dataclasses.replace(plan.recipe.loop, compile=False)
    recipe = dataclasses.replace(plan.recipe, teacher=config, loop=loop)
    with fabric.device:
        denoiser = initial_weights(lambda: build_denoiser(plan.teacher_spec), loop.seed)
    return TeacherStage(denoiser, Batches(plan.dataset, config.batch, loop.seed), recipe, fabric)


def _distillation_stage(
    plan: Plan,
    fabric: Fabric,
    objective: ObjectiveConfig,
    critic_alone: bool,
    images: int,
    kind: type[DistillationStage] = DistillationStage,
) -> DistillationStage:
    """A distillation by one objective, with or without the generator's update from its first step on."""
    warmup_kimg = math.inf if critic_alone else 0.0
    config = dataclasses.replace(_taking(plan.recipe.distillation, images), critic_warmup_kimg=warmup_kimg)
    objective = dataclasses.replace(objective, antithetic=False)  # other noise at the same cost, for even batches only
    loop = dataclasses.replace(plan.recipe.loop, compile=False)
    recipe = dataclasses.replace(plan.recipe, objective=objective, schedule=(), distillation=config, loop=loop)
    batches = None
    if objective.needs_discriminator:
        assert plan.dataset is not None
        batches = Batches(plan.dataset, config.batch, loop.seed)
    with fabric.device:
        players = initial_weights(lambda: Players.from_teacher(build_denoiser(plan.teacher_spec), recipe), loop.seed)
    pair, _, class_ids = _inputs(plan)
    return kind(players, recipe, fabric, batches, plan.reward, Pairs(latents=pair, images=pair, class_ids=class_ids))


Config = TypeVar("Config", TeacherConfig, DistillationConfig)


def _taking(config: Config, images: int) -> Config:
    """Steps on that many images at once: one time, or two where the recipe sums micro-batches, which has costs of its own."""
    passes = 2 if micro_batch_of(config) < config.batch else 1
    return dataclasses.replace(config, batch=images * passes, micro_batch=images)


def _inputs(plan: Plan, images: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    """Grey images at noise level 1, and their classes where there are any."""
    spec = plan.teacher_spec
    class_ids = torch.zeros(images, dtype=torch.int64) if spec.num_classes else None
    return torch.zeros(images, *spec.image_shape), torch.ones(images, 1, 1, 1), class_ids


def _generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _free_bytes(device: torch.device) -> float:
    """Memory that can be had on the device; infinite where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = _MEMINFO.read_text().splitlines() if _MEMINFO.exists() else []
    return next((1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), math.inf)
