"""The critic of a student: its fake score, and a discriminator's head on the fake score's encoder."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.networks.blocks import Conv2d, GroupNorm, Linear
from uni_instruct.networks.ddpmpp import EDMDenoiser


class Critic(nn.Module):
    """Denoises the student's samples and, with a head, tells them from data at the same noise level."""

    def __init__(self, fake_score: EDMDenoiser, with_discriminator: bool):
        super().__init__()
        self.fake_score = fake_score
        network = fake_score.model
        self.head = DiscriminatorHead(network.bottleneck_channels, network.emb_channels) if with_discriminator else None

    def forward(self, x: Tensor, sigma: Tensor, class_ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The denoised images [B, C, H, W] and the logits [B], real against fake (None without a discriminator)."""
        encoded = self.fake_score.encode(x, sigma, class_ids)
        logits = None if self.head is None else self.head(encoded.features[-1], encoded.emb)
        return self.fake_score.decode(encoded, x, sigma), logits

    def logits(self, x: Tensor, sigma: Tensor, class_ids: Tensor | None) -> Tensor:
        """The logits [B] alone, without the decoder's cost."""
        assert self.head is not None
        encoded = self.fake_score.encode(x, sigma, class_ids)
        out: Tensor = self.head(encoded.features[-1], encoded.emb)
        return out


class DiscriminatorHead(nn.Module):
    """Bottleneck features [B, C, H, W] and embedding [B, E] to one logit a sample: the log density ratio."""

    def __init__(self, channels: int, emb_channels: int):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.conv = Conv2d(channels, channels, 3)
        self.hidden = Linear(channels + emb_channels, channels)
        self.logit = nn.Linear(channels, 1)
        # Zero, so that every ratio starts at 1.
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)

    def forward(self, features: Tensor, emb: Tensor) -> Tensor:
        """Logits [B]."""
        pooled = F.silu(self.conv(F.silu(self.norm(features)))).mean(dim=(2, 3))
        hidden = F.silu(self.hidden(torch.cat([pooled, emb], dim=1)))
        return self.logit(hidden).flatten()
