"""The critic of a student: the fake score, and a discriminator whose logit is the log density ratio."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.networks.blocks import Conv2d, Linear
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.group_norm import GroupNorm


class CriticOutput(NamedTuple):
    """The fake score's denoised images [B, C, H, W], and the discriminator's logits [B]; None for what was not requested."""

    denoised: Tensor | None
    logits: Tensor | None


class Critic(nn.Module):
    """Denoises the student's samples and, with a discriminator, distinguishes them from data at the same noise level.

    discriminator: 'shared' puts a head on the fake score's encoder, as SiDA does. 'own' gives the head a separate encoder,
    initialised with a copy of the fake score's. None: no discriminator.
    """

    def __init__(self, fake_score: Denoiser, discriminator: str | None):
        super().__init__()
        self.fake_score = fake_score
        network = fake_score.model
        self.head = DiscriminatorHead(network.bottleneck_channels, network.emb_channels) if discriminator else None
        self.own_encoder = _encoder_of(fake_score) if discriminator == "own" else None

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_ids: Tensor | None,
        augment_labels: Tensor | None = None,
        *,
        denoise: bool = True,
        discriminate: bool = True,
    ) -> CriticOutput:
        """CriticOutput for x [B, C, H, W] at noise levels sigma [B, 1, 1, 1]. Only the requested outputs are computed."""
        # One call returns both outputs, because with a shared encoder they cost a single pass through it.
        discriminate = discriminate and self.head is not None
        denoised = logits = None
        shared = None
        if denoise or (discriminate and self.own_encoder is None):
            shared = self.fake_score.encode(x, sigma, class_ids, augment_labels)
        if denoise:
            assert shared is not None
            denoised = self.fake_score.decode(shared, x, sigma)
        if discriminate:
            assert self.head is not None
            encoded = shared if self.own_encoder is None else self.own_encoder.encode(x, sigma, class_ids, augment_labels)
            assert encoded is not None
            logits = self.head(encoded.features[-1], encoded.emb)
        return CriticOutput(denoised, logits)


class DiscriminatorHead(nn.Module):
    """One logit a sample from the bottleneck features [B, C, H, W] and the embedding [B, E].

    The optimal logit is the log density ratio, log p_real - log p_fake.
    """

    def __init__(self, channels: int, emb_channels: int):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.conv = Conv2d(channels, channels, 3)
        self.hidden = Linear(channels + emb_channels, channels)
        self.logit = nn.Linear(channels, 1)
        # Zero weights, so that every density ratio starts at exp(0) = 1 and an untrained head prefers no image.
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, features: Tensor, emb: Tensor) -> Tensor:
        """The logits: [B]."""
        pooled = F.silu(self.conv(F.silu(self.norm(features)))).mean(dim=(2, 3))
        hidden = F.silu(self.hidden(torch.cat([pooled, emb], dim=1)))
        return self.logit(hidden).flatten()


def _encoder_of(denoiser: Denoiser) -> Denoiser:
    """A copy of the denoiser without its decoder."""
    encoder = copy.deepcopy(denoiser)
    encoder.model.dec = nn.ModuleDict()
    return encoder
