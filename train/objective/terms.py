"""The terms of the generator's loss: an f-divergence between teacher and student, over noise levels (docs/objective.md).

r = q_s / p_s and d = grad log q_s - grad log p_s at noise level s. There are two families; both use the table of divergences:

expanded   D_f(q_0 || p_0) = integral s E[h(r) |d|^2] ds. The gradient of E[h |d|^2] is the sum of the path gradients of the
           terms DI, FGM and SIM, where theta acts through x_s = G(z) + s eps only (arXiv 2505.20755, theorem 3.2). SIM's
           weight is differentiated too; the paper's code does not do that.
integral   integral w(s) D_f(q_s || p_s) ds. Its gradient at each level is -E[h(r) d . dx_s] (Diff-Instruct, f-distill).
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
    """The inputs of the loss: noise levels sigma [B, 1, 1, 1] and images [B, C, H, W].

    clean is G(z); noised is clean + sigma eps; teacher and fake are the denoisers' outputs on noised. Gradients flow to the
    generator only, not to the denoisers' weights. In the integral family, teacher and fake carry no gradient.
    """

    sigma: Tensor
    clean: Tensor
    noised: Tensor
    teacher: Tensor
    fake: Tensor


# With x = G(z) + s eps and d = grad log q_s - grad log p_s; what is in [.] is held fixed (arXiv 2505.20755, theorem 3.2):
#   DI  = -r^2 h''(r) [|d|^2 d] . x
#   FGM = 2 (1 - alpha) (h(r) - r h'(r)) |d|^2
#   SIM = 2 h(r) d . (grad log p_s + eps / s) + 2 r h'(r) [d . (grad log p_s + eps / s) d] . x
# The last part is the derivative of SIM's weight along the path, grad h(r) = h'(r) r d (docs/objective.md).
def expanded_terms(
    divergence: Divergence, batch: DiffusedBatch, ratio: Tensor, *, alpha: float = 0.5, exact_sim: bool = True
) -> Terms:
    """The terms di, fgm and sim, [B] each, times sigma^4. Only their gradients are meaningful, not their values.

    ratio: r [B], no gradient (ones for reverse KL). alpha scales FGM by 2 (1 - alpha): 0.5 is exact, 1 drops it (SiD).
    exact_sim differentiates SIM's weight; False holds it fixed, which is biased for every divergence except the reverse KL.
    The factor sigma^4 turns scores into differences of denoised images; `exact_weight` divides it out again.
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
    """The one term of the integral family, [B], times sigma^2. Only its gradient is meaningful; its value is zero."""
    delta = (batch.teacher - batch.fake).detach()  # sigma^2 d
    return {"integral": -divergence.h(ratio.detach()) * _along_path(delta, batch.noised)}


@dataclass(frozen=True)
class Family:
    """A family of objectives: its terms carry a factor sigma^power and have these names."""

    power: int
    names: tuple[str, ...]


FAMILIES = {"expanded": Family(4, ("di", "fgm", "sim")), "integral": Family(2, ("integral",))}


# E_{s ~ p}[w(s) g(s)] = integral of s g(s) ds for w(s) = s / p(s). The terms carry s^power, which is divided out here.
def exact_weight(batch: DiffusedBatch, levels: NoiseLevels, power: int) -> Tensor:
    """sigma / sigma^power / p(sigma), [B]. With it, the mean of the terms over sigma ~ p is the integral over noise levels."""
    return (batch.sigma ** (1 - power) / levels.density(batch.sigma)).flatten()


def sid_weight(batch: DiffusedBatch, levels: NoiseLevels, power: int) -> Tensor:
    """1 / mean |G(z) - D_q|, [B], no gradient: the practical weight of DMD (arXiv 2311.18828) and SiD (arXiv 2404.04057)."""
    # Detached, because the weight is a scale, not a term: its gradient would push images away from the teacher's. The clamp
    # is for noise levels so small that the teacher does not change the image.
    return 1 / (batch.clean - batch.teacher).detach().abs().mean(dim=(1, 2, 3)).clamp(min=1e-5)


def uniform_weight(batch: DiffusedBatch, levels: NoiseLevels, power: int) -> Tensor:
    """1, [B]: each noise level counts as much as its difference of denoised images."""
    return batch.sigma.new_ones(len(batch.sigma))


Weighting = Callable[[DiffusedBatch, NoiseLevels, int], Tensor]
WEIGHTINGS: dict[str, Weighting] = {
    "exact": exact_weight,
    "sid": sid_weight,
    "uniform": uniform_weight,
}


# -log S(l_real) - log(1 - S(l_fake)), S the logistic function. The minimum is at l = log(p_real / p_fake) (arXiv 1406.2661).
def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, real_weight: Tensor | float = 1.0) -> Tensor:
    """Binary cross-entropy, [B]. The optimal logit is the log-ratio of real to fake density.

    real_weight [B], of mean 1, gives each class the same share among real images as among the generator's.
    """
    return real_weight * torch.nn.functional.softplus(-real_logits) + torch.nn.functional.softplus(fake_logits)


# -log S(l_fake), not log(1 - S(l_fake)), whose gradient vanishes when the discriminator is sure (arXiv 1406.2661).
def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """The generator's non-saturating adversarial loss, [B]."""
    return torch.nn.functional.softplus(-fake_logits)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


# v . (x - [x]) has value 0 and derivative [v] . dx, because its factor x - [x] is 0. This gives autograd a vector field.
def _along_path(field: Tensor, x: Tensor) -> Tensor:
    """A term [B] of value zero. Its gradient is that of field . x with the field held fixed."""
    return _dot(field, x - x.detach())
