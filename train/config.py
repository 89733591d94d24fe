"""Recipes: what to train, on which data, for how long. Frozen; validated when built. All defaults are defined here."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from uni_instruct.errors import RequestError
from uni_instruct.evaluate.extractors import EXTRACTORS
from uni_instruct.evaluate.scores import MIN_SAMPLES
from uni_instruct.networks.build import NETWORKS, check_patch
from uni_instruct.spec import DEFAULT_SIGMA_INIT, TEACHER_STEPS, check_name
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.recipe_file import steps_in
from uni_instruct.train.recipe_keys import (
    BOUND,
    KIMG,
    MEANING,
    RANGE,
    RATE,
    SHARE,
    SOME_KIMG,
    Range,
    check_ranges,
    key,
    one_of,
)

AUTO = "auto"
# Allowed names. The tables DECAYS and TRACKERS say what they mean, in modules that this one must not import.
DECAY_NAMES = ("linear", "cosine", "sqrt")
TRACKER_NAMES = ("tensorboard", "wandb", "trackio")
LOOP_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
EVALUATED = Range(1e-6, 1e9, "loop.metric=none scores nothing")


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The network architecture of teacher, fake score and generator. If a teacher is given, its own is used instead.

    None leaves an argument to the architecture's default. Arguments that an architecture does not have are refused.
    """

    architecture: str = key("ddpmpp", "the network inside: ddpmpp, ncsnpp, adm or edm2")
    conditional: bool = key(True, "whether the network knows the classes of the data")
    sigma_data: float = key(0.5, "standard deviation of the data's pixels, assumed by the preconditioning", Range(1e-3, 1e3))
    patch: int | None = key(None, "the network sees patch x patch pixels as one; 2 is about three times as fast", Range(1, 4))
    model_channels: int | None = key(None, "channels at full resolution, before channel_mult", Range(1, 8192))
    channel_mult: tuple[int, ...] | None = key(None, "channels of each level, in units of model_channels", Range(1, 64))
    channel_mult_emb: int | None = key(
        None, "width of the embedding of noise level and class, in units of model_channels", Range(1, 64)
    )
    channel_mult_noise: int | None = key(
        None, "width of the embedding of the noise level alone, in units of model_channels", Range(1, 64)
    )
    num_blocks: int | None = key(None, "residual blocks of a level", Range(1, 64))
    attn_resolutions: tuple[int, ...] | None = key(
        None, "sides, in the network's pixels, at which there is attention", Range(1, 65536)
    )
    dropout: float | None = key(None, "share of activations that are dropped while training", Range(0, 0.99, "0 is none"))
    resample_filter: tuple[int, ...] | None = key(
        None, "filter of up- and downsampling, such as [1, 1] or [1, 3, 3, 1]", Range(1, 1000)
    )

    def __post_init__(self) -> None:
        one_of("network.architecture", self.architecture, NETWORKS)
        if self.patch is not None:
            check_patch(self.patch)
        check_ranges("network", self)

    @property
    def args(self) -> dict[str, Any]:
        """The arguments for the architecture, without those that are None."""
        given = dataclasses.asdict(self).items()
        return {key: value for key, value in given if value is not None and key not in ("architecture", "conditional")}


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The keys that teacher and distillation share: duration, batch, learning rate, augmentation, averages."""

    section: ClassVar[str]
    duration_kimg: float = key(200.0, "how long the stage is, in thousands of images", Range(1e-3, 1e9))
    batch: int = key(128, "images of a step, of all processes together", Range(1, 1_000_000))
    micro_batch: int = key(
        0,
        "most images that a process computes at once; affects memory only; 0: all of its share",
        Range(0, 1_000_000, "0 is all of its share"),
    )
    warmup_kimg: float = key(0.0, "how long the learning rate rises from 0", KIMG)
    decay_kimg: float = key(
        0.0, "how long, at the end, the learning rate decays to 0; 0: no decay", Range(0, 1e9, "0 keeps the rate")
    )
    decay: str = key("linear", "shape of the learning rate's decay: linear, cosine or sqrt")
    augment: float = key(0.0, "probability of each of EDM's augmentations of an image; 0: none", SHARE)
    augment_mirror: bool = key(True, "whether augmentation mirrors images; false for digits and text")
    ema_halflife_kimg: tuple[float, ...] = key((5.0,), "half-lives of the weights' averages; the first is published", KIMG)
    ema_rampup: float = key(
        0.05, "a half-life is at most this share of the images seen so far (EDM's ramp-up)", Range(1e-6, 1e6)
    )
    ema_power_std: tuple[float, ...] = key(
        (), "widths of EDM2's power-function averages, from which `average` makes other widths", Range(0.01, 0.25, "[] is none")
    )

    def __post_init__(self) -> None:
        one_of(f"{self.section}.decay", self.decay, DECAY_NAMES)
        check_ranges(self.section, self)
        if not self.ema_halflife_kimg:
            remedy = "give at least one half-life: the average of the first one is published"
            raise RequestError(f"{self.section}.ema_halflife_kimg is empty", remedy=remedy, param="recipe")
        for name in ("ema_halflife_kimg", "ema_power_std"):
            _refuse_twice(f"{self.section}.{name}", getattr(self, name))

    @property
    def total_steps(self) -> int:
        """The number of steps nearest to duration_kimg, at least one."""
        return steps_in(self.duration_kimg, self.batch)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(StageConfig):
    """EDM's training of the teacher, with log-normal noise levels (arXiv 2206.00364)."""

    section = "teacher"
    bundle: str = key("", "a trained teacher to use: a bundle, another project's file or hf://owner/name; empty: train one")
    learning_rate: float = key(1e-3, "the highest learning rate of Adam", RATE)
    warmup_kimg: float = key(10.0, "how long the learning rate rises from 0", KIMG)
    clip_norm: float = key(0.0, "the largest norm of the gradient; 0: no bound", BOUND)
    p_mean: float = key(-1.2, "mean of log sigma of the noise levels that are trained", Range(-10, 10))
    p_std: float = key(1.2, "standard deviation of log sigma", Range(1e-3, 10))
    label_dropout: float = key(0.0, "share of images whose class is hidden, so that the teacher can be guided", SHARE)
    evaluate_kimg: float = key(50.0, "how often the teacher is scored, and its best weights kept", EVALUATED)
    steps: int = key(TEACHER_STEPS, "steps of the Heun sampler that the teacher is sampled and compared with", Range(2, 1000))


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """A phase of the schedule: an objective that applies until until_kimg of the distillation."""

    until_kimg: float = field(
        metadata={MEANING: "the phase ends when this many thousand images have been generated", RANGE: Range(1e-3, 1e9)}
    )
    objective: ObjectiveConfig = field(metadata={MEANING: "what is minimised until then: any key of objective"})

    def __post_init__(self) -> None:
        check_ranges("schedule", self)


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(StageConfig):
    """The distillation's keys. One kimg is 1000 generated images. augment applies to the critic's inputs."""

    section = "distillation"
    start: str = key("", "a bundle whose weights the generator starts from; empty: the teacher's")
    generator_learning_rate: float = key(1e-5, "the generator's highest learning rate", RATE)
    critic_learning_rate: float = key(1e-5, "the highest learning rate of fake score and discriminator", Range(1e-12, 100))
    discriminator_learning_rate: float = key(
        0.0, "learning rate of the discriminator's head and own encoder; 0: the critic's", Range(0, 100, "0 is the critic's")
    )
    beta1: float = key(0.0, "Adam's beta1, of generator and critic", Range(0, 0.9999))
    beta2: float = key(0.999, "Adam's beta2, of generator and critic", Range(0, 0.999999))
    adam_eps: float = key(1e-8, "Adam's epsilon", Range(1e-20, 1))
    generator_clip_norm: float = key(0.0, "the largest norm of the generator's gradient; 0: no bound", BOUND)
    generator_clip_value: float = key(0.0, "the largest value in the generator's gradient, after its norm; 0: no bound", BOUND)
    critic_clip_norm: float = key(0.0, "the largest norm of the critic's gradient; 0: no bound", BOUND)
    critic_clip_value: float = key(0.0, "the largest value in the critic's gradient, after its norm; 0: no bound", BOUND)
    critic_warmup_kimg: float = key(0.0, "how long the critic is trained alone at first", Range(0, 1e9, "0 is none"))
    sigma_init: float = key(DEFAULT_SIGMA_INIT, "noise level of the generator's input", Range(1e-3, 1e4))
    evaluate_kimg: float = key(20.0, "how often the generator is scored, and its best weights kept", EVALUATED)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The keys of the training loop, for both stages: seed, precision, logging, saving, evaluation, trackers, report."""

    seed: int = key(0, "seed of all random numbers: the same recipe and seed give the same run", Range(0, 2**63 - 1))
    precision: str = key(
        AUTO, "precision of matrix products: 32-true, bf16-mixed or 16-mixed; auto: the fastest on this machine"
    )
    channels_last: bool | str = key(AUTO, "memory format of images, which changes speed alone: true, false; auto measures")
    compile: bool = key(False, "whether networks are compiled, which changes speed alone")
    log_kimg: float = key(2.0, "how often a line is logged", SOME_KIMG)
    state_kimg: float = key(20.0, "how often the state to resume from is saved", SOME_KIMG)
    snapshot_kimg: float = key(20.0, "how often power-function averages are kept for `average`", SOME_KIMG)
    bad_steps_in_a_row: int = key(
        5, "the run stops after this many updates in a row with a gradient that is not finite", Range(1, 1_000_000)
    )
    warn_after_lines: int = key(3, "a warning is shown when a problem has lasted for this many log lines", Range(1, 1_000_000))
    metric: str = key("FD", "what the best weights are chosen by: FD, KD or none, which keeps the last")
    extractor: str = key("auto", "network whose features are compared, as in `evaluate --extractor`; auto chooses by the data")
    samples: int = key(
        1797, "images that are generated to be scored", Range(MIN_SAMPLES, 10_000_000, "loop.metric=none scores nothing")
    )
    grid: int = key(100, "number of images in samples/*.png; with metric none no others are generated", Range(1, 10_000))
    trackers: tuple[str, ...] = key(("tensorboard",), "where scalars and pictures go: tensorboard, wandb, trackio")
    report: bool = key(True, "whether the run ends with report.md, which takes a minute")

    def __post_init__(self) -> None:
        one_of("loop.metric", self.metric, ("FD", "KD", "none"))
        one_of("loop.extractor", self.extractor, EXTRACTORS)
        one_of("loop.precision", self.precision, (AUTO, *LOOP_PRECISIONS))
        if not isinstance(self.channels_last, bool) and self.channels_last != AUTO:
            raise RequestError(
                f"loop.channels_last is {self.channels_last!r}", remedy="give true, false or auto", param="recipe"
            )
        check_ranges("loop", self)
        for tracker in self.trackers:
            one_of("loop.trackers", tracker, TRACKER_NAMES)
        _refuse_twice("loop.trackers", self.trackers)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete recipe. If `data` is empty, a teacher must be given, and objective and metric must not need data."""

    name: str = field(metadata={MEANING: "name of the recipe and of the resulting bundle"})
    data: str = key("", "data set: a built-in name (digits), a zip, a folder, ...; empty if a given teacher is enough")
    measured: str = key("unmeasured", "result that was measured with this recipe")
    published: str = key("", "result that the paper reports, with its source")
    network: NetworkConfig = field(default_factory=NetworkConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    schedule: tuple[PhaseConfig, ...] = key((), "objectives that come before `objective`, in order, each a phase:")
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check_name(self.name)
        until = [phase.until_kimg for phase in self.schedule]
        if until != sorted(set(until)) or (until and until[-1] >= self.distillation.duration_kimg):
            raise RequestError(
                f"schedule's until_kimg {until} do not rise, or reach duration_kimg {self.distillation.duration_kimg:g}",
                remedy=f"give numbers that rise and stay below {self.distillation.duration_kimg:g}",
                param="recipe",
            )
        for shared in ("discriminator", "ratio_bins"):
            if len({getattr(objective, shared) for objective in self.objectives}) > 1:
                raise RequestError(
                    f"objective.{shared} differs between phases", remedy="give all phases the same value", param="recipe"
                )
        config = self.distillation
        if config.critic_warmup_kimg >= config.duration_kimg:
            raise RequestError(
                f"distillation.critic_warmup_kimg {config.critic_warmup_kimg:g} leaves no training for the "
                f"generator: it is not below duration_kimg {config.duration_kimg:g}",
                remedy=f"give critic_warmup_kimg less than {config.duration_kimg:g}, such as 0",
                param="recipe",
            )
        if not self.data:
            self._check_without_data()

    @property
    def objectives(self) -> tuple[ObjectiveConfig, ...]:
        """The objectives of all phases, in order; `objective` is the last."""
        return (*(phase.objective for phase in self.schedule), self.objective)

    @property
    def needs_discriminator(self) -> bool:
        """Whether any phase needs a discriminator, and therefore real data."""
        return any(objective.needs_discriminator for objective in self.objectives)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, as in YAML."""
        return _plain(dataclasses.asdict(self))

    def _check_without_data(self) -> None:
        needy = next((o for o in self.objectives if o.needs_discriminator), None)
        if not self.teacher.bundle:
            problem = "the recipe names no data, which it needs to train the teacher"
        elif needy is not None:
            why = f"divergence '{needy.divergence}'" if needy.needs_ratio else "an adversarial term"
            problem = f"{why} needs real data, but the recipe names none"
        elif self.loop.metric != "none":
            problem = f"metric '{self.loop.metric}' needs data to compare with, but the recipe names none"
        else:
            return
        raise RequestError(
            problem,
            remedy="--set data=..., or train from a teacher alone: teacher.bundle=..., divergence=reverse-kl, "
            "adversarial_scale=0 and metric=none",
            param="data",
        )


def _refuse_twice(key: str, values: tuple[float, ...] | tuple[str, ...]) -> None:
    """Raise RequestError if two averages would get one name (numbers have six digits there), or if a tracker is given twice."""
    names = [value if isinstance(value, str) else f"{value:g}" for value in values]
    if len(set(names)) < len(names):
        raise RequestError(f"{key} has {max(names, key=names.count)} twice", remedy="give each once", param="recipe")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
