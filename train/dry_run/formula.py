"""An objective as text: the formula that the generator minimises, and what the critic learns."""

import dataclasses
from collections.abc import Callable

import torch

from uni_instruct.schedule import KarrasLevels, LogNormalLevels, NoiseLevels, karras_sigma
from uni_instruct.train.config import Recipe
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.objective.methods import METHODS

DIVERGENCE_WORDS = {
    "reverse-kl": "reverse KL divergence KL(student || teacher)",
    "forward-kl": "forward KL divergence KL(teacher || student)",
    "jeffreys": "Jeffreys' divergence of teacher and student, {forward:g} forward KL + {reverse:g} reverse KL",
    "jensen-shannon": "Jensen-Shannon divergence (twice) of teacher and student",
    "chi-square": "Pearson's chi-square divergence of teacher and student",
    "squared-hellinger": "squared Hellinger distance (twice) of teacher and student",
    "alpha": "alpha divergence of order {order:g} of teacher and student",
    "softened-reverse-kl": "softened reverse KL divergence of teacher and student",
}
WEIGHTING_WORDS = {
    "exact": "exact weighting: the mean over these noise levels is the integral",
    "sid": "weighted by 1 / mean |G(z) - D_q|, D_q the teacher's denoised image",
    "uniform": "the same weight for every noise level, in units of denoised images",
}
RATIO_MEAN_WORDS = {
    "batch": "scaled to mean 1 over the batch",
    "running": "divided by the running mean of its noise bin ({bins} bins), then scaled to mean 1 over the batch",
    "none": "not scaled",
}
DISCRIMINATOR_WORDS = {"shared": "on the fake score's encoder", "own": "on an encoder of its own"}

# The terms beside the divergence: the key of the scale, the sign, and the text.
_TERMS: tuple[tuple[str, str, Callable[[ObjectiveConfig], str]], ...] = (
    ("adversarial_scale", "+", lambda o: f"{o.adversarial_scale:g} x pixels x adversarial loss of the discriminator"),
    ("regression_scale", "+", lambda o: f"{o.regression_scale:g} x squared distance to the teacher's image of the same noise"),
    ("reward_scale", "-", lambda o: f"{o.reward_scale:g} x reward {o.reward}"),
)


def method_lines(objective: ObjectiveConfig) -> list[str]:
    """The published method, how this version differs from the paper, and which keys differ from the method's settings."""
    method, changes = METHODS[objective.method], []
    for field in dataclasses.fields(ObjectiveConfig):
        value, usual = getattr(objective, field.name), method.settings.get(field.name, field.default)
        if value != usual and field.name not in ("method", "reward"):
            changes.append(f"{field.name} {_plain(value)} (not {_plain(usual)})")
    lines = [f"method {method.name} ({method.source})"]
    lines += [f"note: {method.note}"] if method.note else []
    return lines + ([f"differs from the method's settings: {', '.join(changes)}"] if changes else [])


def objective_lines(objective: ObjectiveConfig) -> list[str]:
    """The formula that the generator minimises, without terms that are switched off."""
    terms = [("+", _divergence(objective))] if objective.divergence_scale else []
    terms += [(sign, words(objective)) for scale, sign, words in _TERMS if getattr(objective, scale)]
    (sign, first), *others = terms
    lines = [f"minimise {'- ' if sign == '-' else ''}{first}", *(f"{sign} {words}" for sign, words in others)]
    if objective.divergence_scale:
        lines += _zero_terms(objective)
        lines.append(WEIGHTING_WORDS[objective.weighting] + (" (the divergence alone)" if others else ""))
    lines.append(f"noise levels: {_levels(objective.levels)}")
    if objective.needs_ratio:
        scaled = RATIO_MEAN_WORDS[objective.ratio_mean].format(bins=objective.ratio_bins)
        lines.append(
            f"density ratio r = exp(discriminator's logit), the logit clamped to +-{objective.logit_clamp:g}, r {scaled}"
        )
    guidance = {"teacher": objective.teacher_guidance, "fake score": objective.fake_guidance}
    return lines + [f"{name} under classifier-free guidance of {scale:g}" for name, scale in guidance.items() if scale != 1]


def critic_lines(objective: ObjectiveConfig, recipe: Recipe) -> list[str]:
    """What the critic learns in a phase with that objective, and how."""
    networks, augment = "fake score", recipe.distillation.augment
    if recipe.needs_discriminator:
        encoder = DISCRIMINATOR_WORDS[objective.discriminator]
        networks += f", and discriminator {encoder} (its loss x {objective.discriminator_scale:g})"
    # The levels themselves are compared, because different keys may give the same levels.
    same = objective.critic_levels == objective.levels
    levels = ", at the generator's noise levels" if same else f"; noise levels: {_levels(objective.critic_levels)}"
    updates = f"{objective.critic_updates} update{'s' * (objective.critic_updates > 1)} a step"
    lines = [f"critic: {networks}; {updates}{levels}"]
    if objective.fake_training_guidance != 1:
        lines.append(f"fake score trained under classifier-free guidance of {objective.fake_training_guidance:g}")
    if objective.label_dropout:
        lines.append(f"fake score trained without the class for {objective.label_dropout:.3g} of the images")
    return lines + ([f"the critic's inputs are augmented with probability {augment:g}"] if augment else [])


def _divergence(objective: ObjectiveConfig) -> str:
    words = DIVERGENCE_WORDS.get(objective.divergence, "")
    words = words.format(order=objective.order, forward=2 * objective.mix, reverse=2 * (1 - objective.mix))
    words = words or f"divergence of teacher and student with f(r) = {objective.divergence}"
    scale = "" if objective.divergence_scale == 1 else f"{objective.divergence_scale:g} x "
    if objective.family == "integral":
        return f"{scale}{words}, summed over noise levels"
    return f"{scale}{words}, expanded over noise levels: {' + '.join(_expansion(objective)) or 'nothing'}"


def _expansion(objective: ObjectiveConfig) -> list[str]:
    """Text for those of the terms DI, FGM and SIM that are switched on and not zero."""
    weight = _Weight.of(objective)
    fixed = " (weight differentiated)" if objective.exact_sim else " (weight held fixed: biased gradient)"
    terms = {"di": "DI", "fgm": f"FGM x 2(1 - {objective.alpha:g})", "sim": "SIM" + ("" if weight.constant else fixed)}
    zero = weight.zeros(objective.alpha)
    return [words for name, words in terms.items() if getattr(objective, name) and name not in zero]


def _zero_terms(objective: ObjectiveConfig) -> list[str]:
    zeros = _Weight.of(objective).zeros(objective.alpha) if objective.family == "expanded" else {}
    told = [f"{name.upper()} is zero, as {reason}" for name, reason in zeros.items() if getattr(objective, name)]
    return ["; ".join(told)] if told else []


@dataclasses.dataclass(frozen=True)
class _Weight:
    """Whether the divergence's weight h(r) is constant (h' = 0), linear in r (h'' = 0), or proportional to r (h = r h')."""

    constant: bool
    linear: bool
    proportional: bool

    @classmethod
    def of(cls, objective: ObjectiveConfig) -> "_Weight":
        divergence = objective.found_divergence
        # Tested numerically, which also works for a user's own f.
        r = torch.logspace(-2, 2, 41, dtype=torch.float64)
        h, dh, d2h = divergence.h(r), divergence.dh(r), divergence.d2h(r)
        return cls(*(bool((v.abs() <= 1e-9 * h.abs()).all()) for v in (r * dh, r**2 * d2h, h - r * dh)))

    def zeros(self, alpha: float) -> dict[str, str]:
        """The terms of the expansion that vanish, and why."""
        # DI = -r^2 h'' |d|^2 d . x, FGM = 2 (1 - alpha) (h - r h') |d|^2.
        zeros = {"di": "h is constant" if self.constant else "h is linear in r"} if self.linear else {}
        if alpha == 1 or self.proportional:
            zeros["fgm"] = "alpha is 1" if alpha == 1 else "h is proportional to r"
        return zeros


def _levels(levels: NoiseLevels) -> str:
    if isinstance(levels, LogNormalLevels):
        return f"log sigma normal with mean {levels.mean:g}, standard deviation {levels.std:g}"
    assert isinstance(levels, KarrasLevels)
    low, high = (karras_sigma(t / 1000) for t in (levels.tmin, levels.tmax))
    return f"{low:.3g}..{high:.3g} (Karras rho schedule, tmin {levels.tmin:g} to tmax {levels.tmax:g})"


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
