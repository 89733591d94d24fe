"""Recipes: what to train, on what, for how long. Frozen, checked when built; a default stands here and nowhere else."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from uni_instruct.errors import RequestError
from uni_instruct.evaluate.extractors import EXTRACTORS
from uni_instruct.networks.build import NETWORKS, check_patch
from uni_instruct.train.checks import in_range, one_of
from uni_instruct.train.monitoring.trackers import TRACKERS
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.optimization.optimizer import DECAYS, RateSchedule
from uni_instruct.train.recipe_file import steps_in

AUTO = "auto"
LOOP_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The denoiser that teacher, fake score and generator share; a given teacher brings its own.

    None leaves an argument to the architecture, which refuses those that it does not have. patch x patch pixels are one to the
    network, with patch^2 times the channels: 2 is some three times as fast; attn_resolutions count such pixels.
    """

    architecture: str = "ddpmpp"
    conditional: bool = True
    sigma_data: float = 0.5
    patch: int | None = None
    model_channels: int | None = None
    channel_mult: tuple[int, ...] | None = None
    channel_mult_emb: int | None = None
    channel_mult_noise: int | None = None
    num_blocks: int | None = None
    attn_resolutions: tuple[int, ...] | None = None
    dropout: float | None = None
    resample_filter: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        one_of("network.architecture", self.architecture, NETWORKS)
        if self.patch is not None:
            check_patch(self.patch)
        if self.dropout is not None:
            in_range("network.dropout", self.dropout, 0, 0.99)
        if self.num_blocks is not None:
            in_range("network.num_blocks", self.num_blocks, 1, 64)

    @property
    def args(self) -> dict[str, Any]:
        """The architecture's arguments that are given."""
        given = dataclasses.asdict(self).items()
        return {key: value for key, value in given if value is not None and key not in ("architecture", "conditional")}


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What teacher and distillation have in common: how long, how fast, which averages.

    The rate rises over warmup_kimg and falls as `decay` says over the last decay_kimg. micro_batch is the most images a process
    takes at once (0: all of its share). augment is the probability of EDM's augmentations of the images. The first of
    ema_halflife_kimg is published; ema_power_std adds EDM2's power-function averages, for reconstruction after training;
    ema_rampup bounds a half-life by that share of what was seen.
    """

    section: ClassVar[str]
    duration_kimg: float = 200.0
    batch: int = 128
    micro_batch: int = 0
    warmup_kimg: float = 0.0
    decay_kimg: float = 0.0
    decay: str = "linear"
    augment: float = 0.0
    augment_mirror: bool = True
    ema_halflife_kimg: tuple[float, ...] = (5.0,)
    ema_rampup: float = 0.05
    ema_power_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        one_of(f"{self.section}.decay", self.decay, DECAYS)
        for name, low, high in _STAGE_RANGES:
            in_range(f"{self.section}.{name}", getattr(self, name), low, high)
        if not self.ema_halflife_kimg:
            remedy = "give one: it is what is published"
            raise RequestError(f"{self.section}.ema_halflife_kimg is empty", remedy=remedy, param="recipe")
        for std in self.ema_power_std:
            in_range(f"{self.section}.ema_power_std", std, 0.01, 0.25)

    @property
    def total_steps(self) -> int:
        """The whole number of batches that comes nearest to duration_kimg, at least one."""
        return steps_in(self.duration_kimg, self.batch)

    def rate(self, peak: float) -> RateSchedule:
        """The learning rate over the steps, from its highest."""
        return RateSchedule(
            peak=peak,
            total_steps=self.total_steps,
            batch=self.batch,
            warmup_kimg=self.warmup_kimg,
            decay_kimg=self.decay_kimg,
            decay=self.decay,
        )


_STAGE_RANGES = (
    ("duration_kimg", 1e-3, 1e9),
    ("batch", 1, 1_000_000),
    ("micro_batch", 0, 1_000_000),
    ("augment", 0, 1),
    ("ema_rampup", 1e-6, 1e6),
)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(StageConfig):
    """EDM training of the teacher; `bundle` names a trained one instead.

    Noise levels are log-normal with p_mean and p_std; gradients are clipped to clip_norm (0: not). label_dropout hides the
    class of that share of images, for guidance. steps is the number of steps of the Heun sampler that the teacher is
    sampled and compared with.
    """

    section = "teacher"
    bundle: str = ""
    learning_rate: float = 1e-3
    warmup_kimg: float = 10.0
    clip_norm: float = 0.0
    p_mean: float = -1.2
    p_std: float = 1.2
    label_dropout: float = 0.0
    evaluate_kimg: float = 50.0
    steps: int = 18

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("teacher.steps", self.steps, 2, 1000)
        in_range("teacher.label_dropout", self.label_dropout, 0, 1)


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """An objective that holds until so many kimg of the generator's."""

    until_kimg: float
    objective: ObjectiveConfig

    def __post_init__(self) -> None:
        in_range("schedule.until_kimg", self.until_kimg, 1e-3, 1e9)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(StageConfig):
    """One-step distillation: how long, how fast. One kimg is 1000 images of the generator's.

    start names a bundle whose weights the generator starts from, instead of the teacher's. The critic (fake score and
    discriminator) is trained alone for critic_warmup_kimg. sigma_init is the noise level of the generator's input.
    The discriminator's head, and its encoder where it has one, learn at discriminator_learning_rate (0: at the critic's).
    Gradients are clipped to *_clip_norm and *_clip_value (0: not). augment concerns what the critic sees.
    """

    section = "distillation"
    start: str = ""
    generator_learning_rate: float = 1e-5
    critic_learning_rate: float = 1e-5
    discriminator_learning_rate: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.999
    adam_eps: float = 1e-8
    generator_clip_norm: float = 0.0
    generator_clip_value: float = 0.0
    critic_clip_norm: float = 0.0
    critic_clip_value: float = 0.0
    critic_warmup_kimg: float = 0.0
    sigma_init: float = 2.5
    evaluate_kimg: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("distillation.sigma_init", self.sigma_init, 1e-3, 1e4)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What happens beside the steps, for both stages.

    metric is minimised over `samples` generated images, in the features of `extractor` (as in `evaluate --extractor`); 'none'
    keeps the last weights instead of the best, and makes `grid` images. precision is that of matrix products; channels_last and
    compile change speed, not the arithmetic. 'auto' takes of precision and channels_last what is fastest on this machine, and
    the run's recipe.yaml says what that was. After bad_steps_in_a_row updates that were not finite the run stops; what looks
    sick for warn_after_lines log lines is said in words. trackers gets the scalars and pictures. snapshot_kimg is how often
    power-function averages are kept for reconstruction. report: whether the run ends with report.md, which takes a minute.
    """

    seed: int = 0
    precision: str = AUTO
    channels_last: bool | str = AUTO
    compile: bool = False
    log_kimg: float = 2.0
    state_kimg: float = 20.0
    snapshot_kimg: float = 20.0
    bad_steps_in_a_row: int = 5
    warn_after_lines: int = 3
    metric: str = "FD"
    extractor: str = "auto"
    samples: int = 1797
    grid: int = 100
    trackers: tuple[str, ...] = ("tensorboard",)
    report: bool = True

    def __post_init__(self) -> None:
        one_of("loop.metric", self.metric, ("FD", "KD", "none"))
        one_of("loop.extractor", self.extractor, EXTRACTORS)
        one_of("loop.precision", self.precision, (AUTO, *LOOP_PRECISIONS))
        if not isinstance(self.channels_last, bool) and self.channels_last != AUTO:
            raise RequestError(
                f"loop.channels_last is {self.channels_last!r}", remedy="give true, false or auto", param="recipe"
            )
        in_range("loop.bad_steps_in_a_row", self.bad_steps_in_a_row, 1, 1_000_000)
        in_range("loop.warn_after_lines", self.warn_after_lines, 1, 1_000_000)
        for name in ("log_kimg", "state_kimg", "snapshot_kimg"):
            in_range(f"loop.{name}", getattr(self, name), 1e-6, 1e9)
        for tracker in self.trackers:
            one_of("loop.trackers", tracker, TRACKERS)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All of it. `data` is whatever `open_dataset` takes, or empty where a given teacher is enough.

    schedule lists the objectives that come before `objective`, each until so many kimg. `measured` says what the recipe
    reached, or 'unmeasured'; `published` what its paper reports, with the source.
    """

    name: str
    data: str = ""
    measured: str = "unmeasured"
    published: str = ""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    schedule: tuple[PhaseConfig, ...] = ()
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        until = [phase.until_kimg for phase in self.schedule]
        if until != sorted(until) or (until and until[-1] >= self.distillation.duration_kimg):
            raise RequestError(
                f"schedule's until_kimg {until} do not rise to below duration_kimg {self.distillation.duration_kimg:g}",
                remedy="give them in order",
                param="recipe",
            )
        for key in ("discriminator", "ratio_bins"):
            if len({getattr(objective, key) for objective in self.objectives}) > 1:
                raise RequestError(f"objective.{key} differs between phases", remedy="give one to all", param="recipe")
        if not self.data:
            self._check_without_data()

    @property
    def objectives(self) -> tuple[ObjectiveConfig, ...]:
        """Every phase's, in order."""
        return (*(phase.objective for phase in self.schedule), self.objective)

    @property
    def needs_discriminator(self) -> bool:
        """Whether any phase tells real images from the generator's, and so needs real data beside the teacher."""
        return any(objective.needs_discriminator for objective in self.objectives)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML takes them."""
        return _plain(dataclasses.asdict(self))

    def _check_without_data(self) -> None:
        needy = next((o for o in self.objectives if o.needs_discriminator), None)
        if not self.teacher.bundle:
            problem = "a teacher is trained from data, and the recipe has none"
        elif needy is not None:
            why = f"divergence '{needy.divergence}'" if needy.needs_ratio else "an adversarial term"
            problem = f"{why} needs real data, and the recipe has none"
        elif self.loop.metric != "none":
            problem = f"metric '{self.loop.metric}' compares with data, and the recipe has none"
        else:
            return
        raise RequestError(
            problem,
            remedy="--set data=..., or train from a teacher alone: teacher.bundle=..., divergence=reverse-kl, "
            "adversarial_scale=0 and metric=none",
            param="data",
        )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
