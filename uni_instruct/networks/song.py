"""DDPM++ (Song et al. 2021, arXiv 2011.13456) in EDM's form."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.errors import RequestError
from uni_instruct.latents import ImageShape
from uni_instruct.networks.blocks import Conv2d, Linear, PositionalEmbedding, UNetBlock
from uni_instruct.networks.group_norm import GroupNorm
from uni_instruct.networks.network import Network


class SongUNet(Network):
    """The U-Net F(x; noise label, class, augmentation). Level i works at resolution >> i with channels * channel_mult[i]."""

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int = 0,
        *,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
    ):
        super().__init__()
        image_channels, height, width = image_shape
        _check_resolution(height, width, len(channel_mult))
        emb_channels = self.emb_channels = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels)
        self.map_label = Linear(num_classes, model_channels) if num_classes else None
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        block = partial(UNetBlock, emb_channels=emb_channels, dropout=dropout)

        widths = [model_channels * mult for mult in channel_mult]
        self.enc = nn.ModuleDict({f"{_level_name(height, width, 0)}_conv": Conv2d(image_channels, model_channels, 3)})
        cout, skips = model_channels, [model_channels]
        for level, channels in enumerate(widths):
            name, attention = _level_name(height, width, level), (height >> level) in attn_resolutions
            if level:
                self.enc[f"{name}_down"] = block(cout, cout, down=True)
                skips.append(cout)
            for index in range(num_blocks):
                self.enc[f"{name}_block{index}"] = block(cout, channels, attention=attention)
                cout = channels
                skips.append(cout)
        self.bottleneck_channels = cout

        self.dec = nn.ModuleDict()
        for level, channels in reversed(list(enumerate(widths))):
            name, attention = _level_name(height, width, level), (height >> level) in attn_resolutions
            if level == len(widths) - 1:
                self.dec[f"{name}_in0"] = block(cout, cout, attention=True)
                self.dec[f"{name}_in1"] = block(cout, cout)
            else:
                self.dec[f"{name}_up"] = block(cout, cout, up=True)
            for index in range(num_blocks + 1):
                self.dec[f"{name}_block{index}"] = block(
                    cout + skips.pop(), channels, attention=attention and index == num_blocks
                )
                cout = channels
        self.dec[f"{_level_name(height, width, 0)}_aux_norm"] = GroupNorm(cout)
        self.dec[f"{_level_name(height, width, 0)}_aux_conv"] = Conv2d(cout, image_channels, 3, gain=1e-5)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        """The embedding that every block reads: [B, emb_channels]."""
        emb = self.map_noise(noise_labels)
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Every encoder output, the bottleneck's last."""
        features = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            features.append(x)
        return features

    def decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        """The encoder's outputs to F(x): [B, C, H, W]."""
        skips, x = list(features), features[-1]
        *blocks, norm, conv = self.dec.values()
        for block in blocks:
            assert isinstance(block, UNetBlock)
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        out: Tensor = conv(norm(x, silu=True))
        return out


def _level_name(height: int, width: int, level: int) -> str:
    # EDM names levels by a square resolution; other shapes keep the pattern.
    return f"{height >> level}x{width >> level}"


def _check_resolution(height: int, width: int, levels: int) -> None:
    divisor = 2 ** (levels - 1)
    if height % divisor or width % divisor:
        raise RequestError(
            f"resolution {height}x{width} is not divisible by {divisor}",
            remedy=f"use fewer than {levels} levels or resize the data",
        )
