"""The objective of a recipe: family, divergence, noise levels, density ratio, further terms. Frozen; validated when built."""

from dataclasses import dataclass
from functools import cached_property

from uni_instruct.errors import RequestError
from uni_instruct.schedule import KarrasLevels, LogNormalLevels, NoiseLevels
from uni_instruct.train.objective.divergences.find import find_divergence
from uni_instruct.train.objective.divergences.table import DEFAULT_MIX, DEFAULT_ORDER, Divergence
from uni_instruct.train.objective.methods import METHODS
from uni_instruct.train.objective.terms import FAMILIES, WEIGHTINGS
from uni_instruct.train.recipe_keys import SCALE, SHARE, Range, check_ranges, in_range, key, one_of

NOISES = ("karras", "lognormal")
GUIDANCE = Range(0, 100, "1 is none")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the generator minimises, and what is learned beside it (docs/objective.md)."""

    method: str = key(
        "uni-instruct",
        "a published method, which sets its keys; without a section objective: sid, alpha 0.5",
    )
    family: str = key("expanded", "expanded (Uni-Instruct, SiD) or integral (Diff-Instruct, DMD, f-distill)")
    divergence: str = key("reverse-kl", "a name, or your own f: an expression in r, or file.py:function")
    order: float = key(DEFAULT_ORDER, "order of the alpha family: 0 is the reverse KL, 1 the forward KL", Range(-10, 10))
    mix: float = key(DEFAULT_MIX, "share of the forward KL in Jeffreys' divergence", Range(0, 1))
    di: bool = key(True, "expanded family: whether to include the term DI")
    fgm: bool = key(True, "expanded family: whether to include the term FGM")
    sim: bool = key(True, "expanded family: whether to include the term SIM")
    alpha: float = key(0.5, "scales FGM by 2 (1 - alpha): 0.5 is exact, 1 is SiD", Range(-10, 10))
    exact_sim: bool = key(True, "whether SIM's weight is differentiated; false is biased for all but the reverse KL")
    weighting: str = key("sid", "weight of noise levels: exact, sid or uniform")
    noise: str = key("karras", "the generator's noise levels: karras (uniform on EDM's schedule) or lognormal")
    tmin: float = key(0.0, "karras: the lowest level's place on the schedule, in thousandths", Range(0, 999))
    tmax: float = key(800.0, "karras: the highest level's place on the schedule, in thousandths", Range(1, 1000))
    noise_mean: float = key(-1.2, "lognormal: mean of log sigma", Range(-10, 10))
    noise_std: float = key(1.2, "lognormal: standard deviation of log sigma", Range(1e-3, 10))
    critic_noise: str = key("same", "the critic's noise levels: karras, lognormal, or same as the generator's")
    critic_updates: int = key(1, "updates of the critic per update of the generator", Range(1, 1000))
    discriminator: str = key("shared", "shared: a head on the fake score's encoder; own: with an encoder of its own")
    discriminator_scale: float = key(0.1, "scale of the discriminator's loss, relative to the fake score's loss", Range(0, 1e6))
    logit_clamp: float = key(5.0, "the log-ratio is clamped to [-x, x]", Range(0.1, 50))
    ratio_mean: str = key(
        "batch", "scaling of ratios to mean 1: batch, running (first by a running mean per noise bin) or none"
    )
    ratio_bins: int = key(16, "running: number of noise bins", Range(1, 1000))
    ratio_momentum: float = key(0.99, "running: share of a bin's mean that is kept per sample of the bin", Range(0, 1))
    divergence_scale: float = key(1.0, "scale of the divergence; 0 leaves it out", SCALE)
    adversarial_scale: float = key(0.0, "scale of the adversarial term, per pixel; 0 leaves it out", SCALE)
    regression_scale: float = key(
        0.0, "scale of DMD's regression to (noise, image) pairs of the teacher; 0 leaves it out", SCALE
    )
    regression_pairs: int = key(1000, "number of pairs that are sampled from the teacher", Range(1, 10_000_000))
    reward: str = key("", "module:function or file.py:function, from images and class ids to rewards (docs/objective.md)")
    reward_scale: float = key(0.0, "scale of the reward; 0 leaves it out", SCALE)
    teacher_guidance: float = key(1.0, "classifier-free guidance of the teacher; 1 is none", GUIDANCE)
    fake_guidance: float = key(1.0, "classifier-free guidance of the fake score in the generator's loss; 1 is none", GUIDANCE)
    fake_training_guidance: float = key(
        1.0, "classifier-free guidance of the fake score in its own training; 1 is none", GUIDANCE
    )
    label_dropout: float = key(0.0, "share of the fake score's training samples without a class, needed for guidance", SHARE)

    def __post_init__(self) -> None:
        one_of("objective.method", self.method, METHODS)
        one_of("objective.family", self.family, FAMILIES)
        one_of("objective.weighting", self.weighting, WEIGHTINGS)
        one_of("objective.noise", self.noise, NOISES)
        one_of("objective.critic_noise", self.critic_noise, ("same", *NOISES))
        one_of("objective.discriminator", self.discriminator, ("shared", "own"))
        one_of("objective.ratio_mean", self.ratio_mean, ("batch", "running", "none"))
        check_ranges("objective", self)
        in_range("objective.tmin", self.tmin, 0, self.tmax - 1)
        _ = self.found_divergence  # raises here, when the recipe is read, rather than in the first step
        # Checked here, because training would notice late (the student's first update has no terms to add) or never (a
        # divergence whose terms are all off, beside other terms).
        if self.family == "expanded" and not (self.di or self.fgm or self.sim):
            raise RequestError(
                "the expanded family has no term left: objective.di, fgm and sim are all false",
                remedy="set one of them to true",
                param="recipe",
            )
        if not (self.divergence_scale or self.adversarial_scale or self.regression_scale or self.reward_scale):
            raise RequestError(
                "the objective has no term: divergence_scale, adversarial_scale, regression_scale and reward_scale are all 0",
                remedy="give one of them a value above 0",
                param="recipe",
            )
        if self.reward_scale and not self.reward:
            raise RequestError(
                f"method '{self.method}' needs a reward function, because objective.reward_scale is {self.reward_scale:g}",
                remedy="--set reward=file.py:function, a function from images to rewards",
                param="reward",
            )

    # Cached: `needs_ratio` reads it often, and a user's own f is differentiated at 241 ratios each time.
    @cached_property
    def found_divergence(self) -> Divergence:
        """The divergence that the key `divergence` names, with `order` and `mix` applied."""
        return find_divergence(self.divergence, order=self.order, mix=self.mix)

    @property
    def levels(self) -> NoiseLevels:
        """The generator's noise levels."""
        return self._levels(self.noise)

    @property
    def critic_levels(self) -> NoiseLevels:
        """The critic's noise levels."""
        return self._levels(self.noise if self.critic_noise == "same" else self.critic_noise)

    @property
    def needs_ratio(self) -> bool:
        """Whether the divergence reads a density ratio."""
        # With scale 0 the divergence is left out, and its ratio with it.
        return self.found_divergence.needs_ratio and self.divergence_scale != 0

    @property
    def needs_discriminator(self) -> bool:
        """Whether a discriminator learns to tell real images from the generator's. It needs real data."""
        return self.needs_ratio or self.adversarial_scale != 0

    def _levels(self, noise: str) -> NoiseLevels:
        if noise == "karras":
            return KarrasLevels(self.tmin, self.tmax)
        return LogNormalLevels(self.noise_mean, self.noise_std)
