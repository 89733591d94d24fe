"""The generator's gradient: an f-divergence between teacher and student, taken along the diffusion (docs/objective.md).

With r = q_s / p_s and d = grad log q_s - grad log p_s at noise level s, two families share the divergences' table:

expanded   D_f(q_0 || p_0) = integral s E[h(r) |d|^2] ds; the gradient of E[h |d|^2] is the path gradient, through
           x_s = G(z) + s eps alone, of the terms DI, FGM and SIM (arXiv 2505.20755, theorem 3.2; SIM's weight is
           differentiated as well, which the paper's code leaves out).
integral   integral w(s) D_f(q_s || p_s) ds, whose gradient is -E[h(r) d . dx_s] at each level (Diff-Instruct, f-distill).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from uni_instruct.schedule import NoiseLevels
from uni_instruct.train.objective.divergences.table import Divergence

Terms = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class DiffusedBatch:
    """What the loss is made of, at noise levels sigma [B, 1, 1, 1]; images are [B, C, H, W].

    clean is G(z); noised is clean + sigma eps; teacher and fake are the denoisers' outputs on noised. All four carry
    gradients to the generator, none to the denoisers' weights.
    """

    sigma: Tensor
    clean: Tensor
    noised: Tensor
    teacher: Tensor
    fake: Tensor


# With x = G(z) + s eps, d = grad log q_s - grad log p_s and [.] what is held fixed (arXiv 2505.20755, theorem 3.2):
#   DI  = -r^2 h''(r) [|d|^2 d] . x
#   FGM = 2 (1 - alpha) (h(r) - r h'(r)) |d|^2
#   SIM = 2 h(r) d . (grad log p_s + eps / s) + 2 r h'(r) [d . (grad log p_s + eps / s) d] . x
# The last part is the derivative of SIM's weight along the path, grad h(r) = h'(r) r d (docs/objective.md).
def expanded_terms(
    divergence: Divergence, batch: DiffusedBatch, ratio: Tensor, *, alpha: float = 0.5, exact_sim: bool = True
) -> Terms:
    """sigma^4 times the integrand of the expansion, as di, fgm and sim: [B] each. Their gradient is meant, not their value.

    ratio: r [B], no gradient (ones for reverse KL). alpha scales FGM by 2 (1 - alpha): 0.5 is exact, 1 drops it (SiD).
    exact_sim differentiates SIM's weight; False holds it fixed, which is biased for every divergence but the reverse KL.
    The factor sigma^4 turns scores into differences of denoised images; `exact_weight` takes it out again.
    """
    delta = batch.teacher - batch.fake  # sigma^2 d
    residual = batch.fake - batch.clean  # sigma^2 (s_p + eps / sigma)
    d = (delta / batch.sigma**2).detach()
    square, cross = _dot(delta, delta), _dot(delta, residual)
    r = ratio.detach()
    h, dh, d2h = divergence.h(r), divergence.dh(r), divergence.d2h(r)

    sim = 2 * h * cross
    if exact_sim:
        sim = sim + 2 * dh * r * cross.detach() * _along_path(d, batch.noised)
    return {
        "di": -(r**2) * d2h * square.detach() * _along_path(d, batch.noised),
        "fgm": 2 * (1 - alpha) * (h - r * dh) * square,
        "sim": sim,
    }


# grad D_f(q_s || p_s) = -E[h(r) d . dx_s] (Diff-Instruct, arXiv 2305.18455; f-distill, arXiv 2502.15681).
def integral_terms(divergence: Divergence, batch: DiffusedBatch, ratio: Tensor) -> Terms:
    """sigma^2 times the integrand of the integral family, as one term [B]; its gradient is meant, not its value (zero)."""
    delta = (batch.teacher - batch.fake).detach()  # sigma^2 d
    return {"integral": -divergence.h(ratio.detach()) * _along_path(delta, batch.noised)}


@dataclass(frozen=True)
class Family:
    """terms carry a factor sigma^power; names are the terms' names."""

    power: int
    names: tuple[str, ...]


FAMILIES = {"expanded": Family(4, ("di", "fgm", "sim")), "integral": Family(2, ("integral",))}


# E_{s ~ p}[w(s) g(s)] = integral of s g(s) ds for w(s) = s / p(s); the terms carry s^power, which is taken out again.
def exact_weight(batch: DiffusedBatch, levels: NoiseLevels, power: int) -> Tensor:
    """sigma / sigma^power / p(sigma), [B]: the weighted terms' mean over sigma ~ p is the integral over noise levels."""
    return (batch.sigma ** (1 - power) / levels.density(batch.sigma)).flatten()


def sid_weight(batch: DiffusedBatch, levels: NoiseLevels, power: int) -> Tensor:
    """1 / mean |G(z) - D_q|, [B], no gradient: the practical weight of DMD (arXiv 2311.18828) and SiD (arXiv 2404.04057)."""
    # Detached: the weight is a scale, not a term; its gradient would push images away from the teacher's. The bound is for
    # levels so small that the teacher changes nothing.
    return 1 / (batch.clean - batch.teacher).detach().abs().mean(dim=(1, 2, 3)).clamp(min=1e-5)


def uniform_weight(batch: DiffusedBatch, levels: NoiseLevels, power: int) -> Tensor:
    """1, [B]: every noise level counts by its difference of denoised images."""
    return batch.sigma.new_ones(len(batch.sigma))


Weighting = Callable[[DiffusedBatch, NoiseLevels, int], Tensor]
WEIGHTINGS: dict[str, Weighting] = {
    "exact": exact_weight,
    "sid": sid_weight,
    "uniform": uniform_weight,
}


# -log S(l_real) - log(1 - S(l_fake)), S the logistic function; least at l = log(p_real / p_fake) (arXiv 1406.2661).
def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, real_weight: Tensor | float = 1.0) -> Tensor:
    """Binary cross-entropy whose optimum is the log-ratio of real to fake density: [B].

    real_weight [B], of mean 1, gives real images of each class the share that the generator's have.
    """
    return real_weight * torch.nn.functional.softplus(-real_logits) + torch.nn.functional.softplus(fake_logits)


# -log S(l_fake) rather than log(1 - S(l_fake)), whose gradient is gone where the discriminator is sure (arXiv 1406.2661).
def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """The generator's side of the same game, non-saturating: [B]."""
    return torch.nn.functional.softplus(-fake_logits)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


# v . (x - [x]) is 0, and its derivative [v] . dx: how a vector field is handed to automatic differentiation.
def _along_path(field: Tensor, x: Tensor) -> Tensor:
    """Zero in value; its gradient is that of field . x with the field held fixed: [B]."""
    return _dot(field, x - x.detach())
