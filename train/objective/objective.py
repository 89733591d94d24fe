"""Objective: a recipe's objective with everything that it names looked up, once per run."""

from dataclasses import dataclass

from torch import Tensor

from uni_instruct.schedule import NoiseLevels
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.objective.divergences.table import Divergence
from uni_instruct.train.objective.reward import Reward
from uni_instruct.train.objective.terms import (
    FAMILIES,
    WEIGHTINGS,
    DiffusedBatch,
    Terms,
    Weighting,
    expanded_terms,
    integral_terms,
)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a training step uses: config holds the numbers, the other fields are the objects that its names stand for.

    reward is None if the objective has no reward.
    """

    config: ObjectiveConfig
    # Looked up once: for a user's own f this executes a file and differentiates f at 241 ratios.
    divergence: Divergence
    weighting: Weighting
    levels: NoiseLevels
    critic_levels: NoiseLevels
    reward: Reward | None

    @classmethod
    def of(cls, config: ObjectiveConfig, reward: Reward | None = None) -> "Objective":
        """Build the objective of a config. reward: the function from `open_reward`; ignored if reward_scale is 0."""
        return cls(
            config=config,
            divergence=config.found_divergence,
            weighting=WEIGHTINGS[config.weighting],
            levels=config.levels,
            critic_levels=config.critic_levels,
            reward=reward if config.reward_scale else None,
        )

    def divergence_terms(self, diffused: DiffusedBatch, ratio: Tensor) -> Terms:
        """The divergence's terms that are switched on, times weight and divergence_scale: name -> [b]. ratio: r [b]."""
        config = self.config
        if config.family == "integral":
            terms = integral_terms(self.divergence, diffused, ratio)
        else:
            switches = {"di": config.di, "fgm": config.fgm, "sim": config.sim}
            every = expanded_terms(self.divergence, diffused, ratio, alpha=config.alpha, exact_sim=config.exact_sim)
            terms = {name: values for name, values in every.items() if switches[name]}
        weight = config.divergence_scale * self.weighting(diffused, self.levels, FAMILIES[config.family].power)
        return {name: weight * values for name, values in terms.items()}
