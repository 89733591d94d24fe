"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): D_none + scale (D_class - D_none); scale 1 is none."""

from collections.abc import Callable

import torch
from torch import Tensor

from uni_instruct.networks.critic import CriticOutput

NO_CLASS = -1


# D_w = D_none + w (D_class - D_none): w = 1 is the class alone, w > 1 exaggerates what it adds.
def guided(denoiser: Callable[..., Tensor], x: Tensor, sigma: Tensor, class_ids: Tensor | None, scale: float) -> Tensor:
    """The guided denoised images [B, C, H, W]; a second evaluation only where scale is not 1."""
    denoised = denoiser(x, sigma, class_ids)
    if scale == 1 or class_ids is None:
        return denoised
    without = denoiser(x, sigma, torch.full_like(class_ids, NO_CLASS))
    return without + scale * (denoised - without)


def guided_critic(
    critic: Callable[..., CriticOutput],
    x: Tensor,
    sigma: Tensor,
    class_ids: Tensor | None,
    augment_labels: Tensor | None = None,
    *,
    scale: float,
    discriminate: bool,
) -> CriticOutput:
    """The critic's guided denoised images, and its logits, which are not guided."""
    # The discriminator's logit is a ratio of densities within a class; there is nothing to exaggerate.
    output = critic(x, sigma, class_ids, augment_labels, discriminate=discriminate)
    if scale == 1 or class_ids is None:
        return output
    hidden = torch.full_like(class_ids, NO_CLASS)
    without = critic(x, sigma, hidden, augment_labels, discriminate=False).denoised
    assert without is not None
    assert output.denoised is not None
    return output._replace(denoised=without + scale * (output.denoised - without))


def drop_classes(class_ids: Tensor | None, share: float, rng: torch.Generator) -> Tensor | None:
    """Class ids with that share of them hidden, so that the denoiser learns to do without."""
    # No number is drawn where nothing is hidden, so that a recipe without it draws what it always did.
    if class_ids is None or not share:
        return class_ids
    hidden = torch.rand(class_ids.shape, generator=rng) < share
    return torch.where(hidden.to(class_ids.device), NO_CLASS, class_ids)
