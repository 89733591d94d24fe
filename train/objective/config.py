"""The objective of a recipe: its family, divergence, noise levels, ratio and further terms. Frozen, checked when built."""

from dataclasses import dataclass
from functools import cached_property

from uni_instruct.errors import RequestError
from uni_instruct.schedule import KarrasLevels, LogNormalLevels, NoiseLevels
from uni_instruct.train.checks import in_range, one_of
from uni_instruct.train.objective.divergences.find import find_divergence
from uni_instruct.train.objective.divergences.table import DEFAULT_MIX, DEFAULT_ORDER, Divergence
from uni_instruct.train.objective.methods import METHODS
from uni_instruct.train.objective.terms import FAMILIES, WEIGHTINGS

NOISES = ("karras", "lognormal")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the generator minimises, and what is learned beside it (docs/objective.md). `method` sets what it names.

    family, divergence (a name, or the user's own f), order of the alpha family, mix of Jeffreys' two halves.
    Expanded family: di, fgm, sim switch its terms; alpha scales FGM (0.5 is exact); exact_sim differentiates SIM's weight.
    Noise levels: 'karras' is uniform on EDM's schedule from tmin/1000 to tmax/1000, 'lognormal' has noise_mean and noise_std;
    weighting is exact, sid or uniform. critic_noise 'same' trains the critic where it is read.
    Ratio: discriminator 'shared' is a head on the fake score's encoder, 'own' has an encoder of its own; discriminator_scale
    weighs its loss against the fake score's; logit_clamp bounds the log-ratio; ratio_mean scales ratios to mean 1 over the
    'batch', over a 'running' average of each of ratio_bins noise bins as well (it keeps ratio_momentum of itself per sample),
    or not ('none').
    Terms: every *_scale multiplies its term, 0 leaves it out. The adversarial term counts per pixel. reward is
    module:function or file.py:function, images [B, C, H, W] in about [-1, 1] and class ids [B] (or None) to rewards [B].
    Guidance: 1 is none; label_dropout hides the class of that share of the fake score's samples.
    critic_updates: updates of the critic for one of the generator.
    """

    method: str = "uni-instruct"
    family: str = "expanded"
    divergence: str = "reverse-kl"
    order: float = DEFAULT_ORDER
    mix: float = DEFAULT_MIX
    di: bool = True
    fgm: bool = True
    sim: bool = True
    alpha: float = 0.5
    exact_sim: bool = True
    weighting: str = "sid"
    noise: str = "karras"
    tmin: float = 0.0
    tmax: float = 800.0
    noise_mean: float = -1.2
    noise_std: float = 1.2
    critic_noise: str = "same"
    critic_updates: int = 1
    discriminator: str = "shared"
    discriminator_scale: float = 0.1
    logit_clamp: float = 5.0
    ratio_mean: str = "batch"
    ratio_bins: int = 16
    ratio_momentum: float = 0.99
    divergence_scale: float = 1.0
    adversarial_scale: float = 0.0
    regression_scale: float = 0.0
    regression_pairs: int = 1000
    reward: str = ""
    reward_scale: float = 0.0
    teacher_guidance: float = 1.0
    fake_guidance: float = 1.0
    fake_training_guidance: float = 1.0
    label_dropout: float = 0.0

    def __post_init__(self) -> None:
        one_of("objective.method", self.method, METHODS)
        one_of("objective.family", self.family, FAMILIES)
        one_of("objective.weighting", self.weighting, WEIGHTINGS)
        one_of("objective.noise", self.noise, NOISES)
        one_of("objective.critic_noise", self.critic_noise, ("same", *NOISES))
        one_of("objective.discriminator", self.discriminator, ("shared", "own"))
        one_of("objective.ratio_mean", self.ratio_mean, ("batch", "running", "none"))
        for name, low, high in _OBJECTIVE_RANGES:
            in_range(f"objective.{name}", getattr(self, name), low, high)
        in_range("objective.tmin", self.tmin, 0, self.tmax - 1)
        _ = self.found_divergence  # refused now rather than in the first step
        if self.family == "expanded" and not (self.di or self.fgm or self.sim):
            raise RequestError("objective.di, fgm and sim are all off", remedy="leave one of them on", param="recipe")
        if not (self.divergence_scale or self.adversarial_scale or self.regression_scale or self.reward_scale):
            raise RequestError("every scale of the objective is 0", remedy="leave one term on", param="recipe")
        if self.reward_scale and not self.reward:
            raise RequestError(
                f"method '{self.method}' needs a reward",
                remedy="--set reward=file.py:function, images to rewards",
                param="reward",
            )

    @cached_property
    def found_divergence(self) -> Divergence:
        """What `divergence` names."""
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
        return self.found_divergence.needs_ratio and self.divergence_scale != 0

    @property
    def needs_discriminator(self) -> bool:
        """Whether real images are told from the generator's, and so real data are needed."""
        return self.needs_ratio or self.adversarial_scale != 0

    def _levels(self, noise: str) -> NoiseLevels:
        if noise == "karras":
            return KarrasLevels(self.tmin, self.tmax)
        return LogNormalLevels(self.noise_mean, self.noise_std)


_OBJECTIVE_RANGES = (
    ("order", -10, 10),
    ("mix", 0, 1),
    ("alpha", -10, 10),
    ("tmax", 1, 1000),
    ("noise_std", 1e-3, 10),
    ("critic_updates", 1, 1000),
    ("discriminator_scale", 0, 1e6),
    ("logit_clamp", 0.1, 50),
    ("ratio_bins", 1, 1000),
    ("ratio_momentum", 0, 1),
    ("divergence_scale", 0, 1e9),
    ("adversarial_scale", 0, 1e9),
    ("regression_scale", 0, 1e9),
    ("regression_pairs", 1, 10_000_000),
    ("reward_scale", 0, 1e9),
    ("label_dropout", 0, 1),
)
