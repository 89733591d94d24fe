"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598).

D_w = D_none + w (D_class - D_none), with D_class the denoiser given the class and D_none the denoiser without it. w is `scale`
here; w = 1 is no guidance.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from uni_instruct.networks.critic import CriticOutput

NO_CLASS = -1


# D_w = D_none + w (D_class - D_none): w = 1 is the class alone, w > 1 amplifies the class's effect.
def guided(denoiser: Callable[..., Tensor], x: Tensor, sigma: Tensor, class_ids: Tensor | None, scale: float) -> Tensor:
    """The guided denoised images [B, C, H, W]. Evaluates the denoiser twice, or once if scale is 1 or there are no classes."""
    denoised = denoiser(x, sigma, class_ids)
    if scale == 1 or class_ids is None:
        return denoised
    without = denoiser(x, sigma, torch.full_like(class_ids, NO_CLASS))
    return without + scale * (denoised - without)


# The same D_w for the fake score inside the critic.
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
    """The critic's output with guided denoised images. Its logits are not guided."""
    # The discriminator's logit is the log-ratio of two densities within a class. Guidance has no meaning for it.
    output = critic(x, sigma, class_ids, augment_labels, discriminate=discriminate)
    if scale == 1 or class_ids is None:
        return output
    hidden = torch.full_like(class_ids, NO_CLASS)
    without = critic(x, sigma, hidden, augment_labels, discriminate=False).denoised
    assert without is not None
    assert output.denoised is not None
    return output._replace(denoised=without + scale * (output.denoised - without))


def drop_classes(class_ids: Tensor | None, share: float, rng: torch.Generator) -> Tensor | None:
    """Class ids with a random `share` of them replaced by NO_CLASS, so that the denoiser also learns without classes."""
    # With share 0 no random number is drawn, so recipes without label dropout keep their random sequence.
    if class_ids is None or not share:
        return class_ids
    hidden = torch.rand(class_ids.shape, generator=rng) < share
    return torch.where(hidden.to(class_ids.device), NO_CLASS, class_ids)
