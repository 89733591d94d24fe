"""What a plan costs: parameters, FLOPs, memory, disk and time, of each stage and of the whole run."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from uni_instruct.networks.build import build_denoiser
from uni_instruct.spec import evaluations
from uni_instruct.train.config import Recipe, StageConfig
from uni_instruct.train.dry_run.trial import StepCounter, StepTimer, Timing, TrialLimits, micro_batch_of
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.optimization.auto_precision import exact, resolve_precision
from uni_instruct.train.plan import Plan
from uni_instruct.train.stages.distillation import DistillationModels

MEASURE_S = 18.0
MB = 2**20
# NVIDIA's data sheet of the H100 SXM: float32 without TF32 (training does not use TF32), and dense 16-bit products.
GPU_FLOPS_PER_S = {"32-true": 67e12, "bf16-mixed": 989e12, "16-mixed": 989e12}
# The assumed share of that peak that such networks reach. The output says that it is an assumption.
GPU_SHARE = 0.3
FLOAT_BYTES = 4  # gradients and Adam's moments are float32 in every precision


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of the distillation with one objective. critic_alone: the critic's warm-up. images: number of generated images."""

    from_kimg: float
    until_kimg: float
    images: int
    objective: ObjectiveConfig
    critic_alone: bool


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of one process, in bytes. All are exact except activations: what autograd keeps of a micro-batch."""

    weights: int
    gradients: int
    moments: int
    averages: int
    activations: int

    @property
    def fixed(self) -> int:
        """The part that does not depend on the micro-batch."""
        return self.weights + self.gradients + self.moments + self.averages

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.fixed + self.activations


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """The cost of one stage. images and flops_per_image have an entry for each phase; timing is that of the last phase.

    flops_per_image: FLOPs of a step / its number of images. disk, in bytes: two states (old and new, while one is replaced),
    the bundle, and the snapshots of power-function averages.
    """

    images: tuple[int, ...]
    flops_per_image: tuple[float, ...]
    micro_batch: int
    memory: Memory
    disk: int
    timing: Timing | None

    @property
    def flops(self) -> float:
        """FLOPs of the whole stage: the sum over phases of images x FLOPs per image."""
        return sum(images * flops for images, flops in zip(self.images, self.flops_per_image, strict=True))

    @property
    def time_s(self) -> float | None:
        """Seconds of the whole stage, if all phases have the FLOPs per second of the timed one. None without a timing."""
        # Seconds per image x FLOPs of the stage / FLOPs per image: the phases run the same kernels on the same shapes.
        return None if self.timing is None else self.timing.s_per_image * self.flops / self.flops_per_image[-1]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a run. teacher is None if the recipe gives one. pairs_flops: FLOPs of sampling the pairs for regression."""

    parameters: dict[str, int]
    phases: tuple[Phase, ...]
    teacher: StageCost | None
    generator: StageCost
    pairs_flops: float
    device: str

    @property
    def stages(self) -> dict[str, StageCost]:
        """The stages that are trained, in order."""
        return ({"teacher": self.teacher} if self.teacher else {}) | {"generator": self.generator}

    @property
    def flops(self) -> float:
        """FLOPs of the whole run without evaluation."""
        return sum(stage.flops for stage in self.stages.values()) + self.pairs_flops

    @property
    def disk(self) -> int:
        """Bytes on disk that the run needs at most, without log, pictures and pairs."""
        return sum(stage.disk for stage in self.stages.values())

    def gpu_days(self, precision: str) -> float:
        """Days on one H100, if training reaches GPU_SHARE of its peak: FLOPs / (peak FLOPs per second x share x 86400)."""
        return self.flops / (GPU_FLOPS_PER_S[precision] * GPU_SHARE * 86400)

    @property
    def time_s(self) -> float | None:
        """Seconds of the whole run without evaluation; None unless every stage was timed."""
        times = [stage.time_s for stage in self.stages.values()]
        # The pairs were not timed. They are assumed to run at the generator stage's FLOPs per second.
        pairs = self.pairs_flops / self.generator.flops * (self.generator.time_s or 0)
        return None if None in times else sum(time for time in times if time is not None) + pairs


def resolve_auto(plan: Plan, *, measured: bool = True) -> Plan:
    """The plan with `auto` in its recipe's precision resolved: to the fastest here or, if not measured, to the exact one."""
    recipe, images = plan.recipe, max(micro_batch_of(config) for config in (plan.recipe.teacher, plan.recipe.distillation))
    loop = resolve_precision(recipe.loop, plan.teacher_spec, images) if measured else exact(recipe.loop)
    return dataclasses.replace(plan, recipe=dataclasses.replace(recipe, loop=loop))


def cost_of(plan: Plan, budget_s: float = MEASURE_S) -> Cost:
    """Count and time a step of each stage. Timing takes about budget_s seconds."""
    # Counting runs on the meta device without arithmetic and memory, so networks of full size are counted.
    counted, models = StepCounter(plan), models_on_meta(plan)
    evaluation_flops = counted.evaluation()
    timed = StepTimer(plan, evaluation_flops, _bytes(models.teacher))
    given, recipe = plan.given_teacher is not None, plan.recipe
    pairs = max((o.regression_pairs for o in recipe.objectives if o.regression_scale), default=0)
    return Cost(
        parameters=count_parameters(models),
        phases=phases(recipe),
        teacher=None if given else _teacher(plan, models, counted, timed, budget_s / 3),
        generator=_generator(plan, models, counted, timed, budget_s * (1 if given else 2 / 3)),
        pairs_flops=pairs * evaluations(recipe.teacher.steps) * evaluation_flops,
        device=timed.device,
    )


def phases(recipe: Recipe) -> tuple[Phase, ...]:
    """The phases of the distillation: the critic's warm-up, the schedule's objectives, and the final one."""
    config = recipe.distillation

    def first_step(kimg: float) -> int:
        return min(config.total_steps, math.ceil(kimg * 1000 / config.batch - 1e-9))

    # Edges are whole steps, rounded as in training. Warm-up and schedule may overlap, so a phase ends wherever either does.
    warm = first_step(config.critic_warmup_kimg)
    edges = sorted({0, warm, config.total_steps, *(first_step(phase.until_kimg) for phase in recipe.schedule)})
    return tuple(
        Phase(
            from_kimg=start * config.batch / 1000,
            until_kimg=stop * config.batch / 1000,
            images=(stop - start) * config.batch,
            objective=next((p.objective for p in recipe.schedule if start < first_step(p.until_kimg)), recipe.objective),
            critic_alone=start < warm,
        )
        for start, stop in pairwise(edges)
    )


def models_on_meta(plan: Plan) -> DistillationModels:
    """The networks of the distillation in full size, on the meta device except for what a discriminator adds."""
    with torch.device("meta"):
        teacher = build_denoiser(plan.teacher_spec)
    return DistillationModels.from_teacher(teacher, plan.recipe)


def count_parameters(models: DistillationModels) -> dict[str, int]:
    """Number of parameters of each network. The discriminator's are those that it adds to the fake score."""
    fake_score, critic = _size(models.critic.fake_score), _size(models.critic)
    return {
        "generator": _size(models.student),
        "fake_score": fake_score,
        "discriminator": critic - fake_score,
        "teacher": _size(models.teacher),
    }


def _teacher(plan: Plan, models: DistillationModels, counted: StepCounter, timed: StepTimer, budget_s: float) -> StageCost:
    config, counts, networks = plan.recipe.teacher, counted.teacher(), [models.teacher]
    memory = _memory(networks, networks, models.teacher, config, counts.activations)
    return StageCost(
        images=(config.total_steps * config.batch,),
        flops_per_image=(counts.flops,),
        micro_batch=micro_batch_of(config),
        memory=memory,
        disk=_disk(networks, models.teacher, config, plan.recipe.loop.snapshot_kimg),
        timing=timed.teacher(counts.flops, _limits(memory, config, budget_s)),
    )


def _generator(plan: Plan, models: DistillationModels, counted: StepCounter, timed: StepTimer, budget_s: float) -> StageCost:
    config, stretches = plan.recipe.distillation, phases(plan.recipe)
    counts = [counted.distillation(phase.objective, phase.critic_alone) for phase in stretches]
    trained, last = [models.student, models.critic], stretches[-1]
    activations = max(c.activations for c in counts)
    memory = _memory([models.teacher, *trained], trained, models.student, config, activations)
    limits = _limits(memory, config, budget_s)
    return StageCost(
        images=tuple(phase.images for phase in stretches),
        flops_per_image=tuple(c.flops for c in counts),
        micro_batch=micro_batch_of(config),
        memory=memory,
        disk=_disk(trained, models.student, config, plan.recipe.loop.snapshot_kimg),
        timing=timed.distillation(last.objective, last.critic_alone, counts[-1].flops, limits),
    )


def _memory(
    networks: Sequence[nn.Module],
    trained: Sequence[nn.Module],
    averaged: nn.Module,
    config: StageConfig,
    activations_per_image: float,
) -> Memory:
    sizes = [FLOAT_BYTES * _size(network) for network in trained]
    return Memory(
        weights=sum(_bytes(network) for network in networks),
        gradients=max(sizes),  # a network's gradients are freed before the next network's are computed
        # Adam keeps two moments per parameter, of every trained network.
        moments=2 * sum(sizes),
        averages=(len(config.ema_halflife_kimg) + len(config.ema_power_std)) * _bytes(averaged),
        activations=round(activations_per_image * micro_batch_of(config)),
    )


def _disk(trained: Sequence[nn.Module], averaged: nn.Module, config: StageConfig, snapshot_kimg: float) -> int:
    averages = (len(config.ema_halflife_kimg) + len(config.ema_power_std)) * _bytes(averaged)
    state = sum(_bytes(network) + 2 * FLOAT_BYTES * _size(network) for network in trained) + averages
    snapshots = len(config.ema_power_std) * math.ceil(config.duration_kimg / snapshot_kimg) * _bytes(averaged)
    # Two states, because the old one is kept until the new one is complete.
    return 2 * state + _bytes(averaged) + snapshots


def _limits(memory: Memory, config: StageConfig, budget_s: float) -> TrialLimits:
    images = micro_batch_of(config)
    per_image = max(1.0, memory.activations / images)
    return TrialLimits(images=images, fixed_bytes=memory.fixed, bytes_per_image=per_image, budget_s=budget_s)


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
