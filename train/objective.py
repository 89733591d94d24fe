"""The generator's loss: an f-divergence between teacher and student, expanded along the diffusion (docs/objective.md).

Per noise level s, with r = q_s / p_s and d = grad log q_s - grad log p_s, the gradient of E[h(r) |d|^2] is the path
gradient, through x_s = G(z) + s eps alone, of three terms: DI, FGM and SIM (arXiv 2505.20755, theorem 3.2; SIM's weight is
differentiated as well, which the paper's code leaves out).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from uni_instruct.divergence import Divergence


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


def expanded_loss(divergence: Divergence, batch: DiffusedBatch, ratio: Tensor, alpha: float = 0.5) -> Tensor:
    """sigma^4 times the integrand of the expansion: [B]. Its gradient is meant, its value only indicates.

    ratio: r [B], no gradient (ones for reverse KL). alpha scales FGM by 2 (1 - alpha): 0.5 is exact, 1 drops it (SiD).
    The factor sigma^4 turns scores into differences of denoised images; `loss_weight` takes it out again.
    """
    delta = batch.teacher - batch.fake  # sigma^2 d
    residual = batch.fake - batch.clean  # sigma^2 (s_p + eps / sigma)
    d = (delta / batch.sigma**2).detach()
    square, cross = _dot(delta, delta), _dot(delta, residual)
    r = ratio.detach()
    h, dh, d2h = divergence.h(r), divergence.dh(r), divergence.d2h(r)

    di = -(r**2) * d2h * square.detach() * _along_path(d, batch.noised)
    fgm = 2 * (1 - alpha) * (h - r * dh) * square
    sim = 2 * h * cross + 2 * dh * r * cross.detach() * _along_path(d, batch.noised)
    return di + fgm + sim


def exact_weight(sigma: Tensor, density: Tensor) -> Tensor:
    """sigma / sigma^4 / p(sigma), [B]: the expectation over sigma ~ p of the weighted loss is the divergence's integral."""
    return (sigma**-3).flatten() / density.flatten()


def sid_weight(batch: DiffusedBatch) -> Tensor:
    """1 / mean |G(z) - D_q|, [B], no gradient: SiD's practical weight (arXiv 2404.04057)."""
    return 1 / (batch.clean - batch.teacher).detach().abs().mean(dim=(1, 2, 3)).clamp(min=1e-5)


def density_ratio(logits: Tensor, clamp: float) -> Tensor:
    """r = exp(logit) of a balanced real-against-fake discriminator, [B], with mean 1 over the batch as E_p[r] = 1."""
    ratio = logits.detach().clamp(-clamp, clamp).exp()
    return ratio / ratio.mean()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _along_path(field: Tensor, x: Tensor) -> Tensor:
    """Zero in value; its gradient is that of field . x with the field held fixed: [B]."""
    return _dot(field, x - x.detach())


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Binary cross-entropy whose optimum is the log-ratio of real to fake density: [B]."""
    return torch.nn.functional.softplus(-real_logits) + torch.nn.functional.softplus(fake_logits)
