"""How EDM's and EDM2's U-Nets are put together from their blocks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uni_instruct.errors import RequestError
from uni_instruct.networks.blocks import UNetBlock
from uni_instruct.spec import ImageShape


class Level(NamedTuple):
    """One resolution of a U-Net: its name in EDM's parameters, its channels, whether its blocks attend."""

    name: str
    channels: int
    attention: bool


class ResolutionError(RequestError):
    """A resolution that so many levels cannot halve: level_count - 1 times is once too often."""

    def __init__(self, height: int, width: int, level_count: int):
        self.level_count, self.divisor = level_count, 2 ** (level_count - 1)
        super().__init__(
            f"resolution {height}x{width} is not divisible by {self.divisor}",
            remedy=f"use fewer than {level_count} levels or resize the data",
        )


def levels(
    image_shape: ImageShape, model_channels: int, channel_mult: Sequence[int], attn_resolutions: Sequence[int]
) -> list[Level]:
    """The finest first. Raises ResolutionError for a resolution that cannot be halved so often."""
    _, height, width = image_shape
    if not channel_mult:
        raise RequestError("channel_mult is empty", remedy="give one multiplier a level", param="network")
    divisor = 2 ** (len(channel_mult) - 1)
    if height % divisor or width % divisor:
        raise ResolutionError(height, width, len(channel_mult))
    # EDM names levels by a square resolution; other shapes keep the pattern.
    return [
        Level(f"{height >> index}x{width >> index}", model_channels * mult, (height >> index) in attn_resolutions)
        for index, mult in enumerate(channel_mult)
    ]


def nothing(*_: object) -> dict[str, nn.Module]:
    """No modules beside a level's blocks."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Skeleton:
    """How blocks make up a U-Net: levels, the finest first, with num_blocks each on the way down and one more on the way up.

    block makes a block, which knows its in_channels and out_channels, from these and what differs from block to block.
    attend_often: on the way up all blocks of a level that attends do, else the last.
    """

    levels: list[Level]
    num_blocks: int
    block: Callable[..., nn.Module]
    attend_often: bool

    def encoder(self, stem: nn.Module, beside: Callable[[str, int, int], dict[str, nn.Module]] = nothing) -> nn.ModuleDict:
        """The stem and every level's blocks.

        beside(name of a level, channels that entered the level above it, channels that enter it) stands after the first block
        of a level that halves the resolution.
        """
        enc = nn.ModuleDict({f"{self.levels[0].name}_conv": stem})
        above, channels = int(stem.in_channels), int(stem.out_channels)  # type: ignore[arg-type]
        for level in self.levels:
            if level is not self.levels[0]:
                enc[f"{level.name}_down"] = self.block(channels, channels, down=True)
                enc.update(beside(level.name, above, channels))
                above = channels
            for index in range(self.num_blocks):
                enc[f"{level.name}_block{index}"] = self.block(channels, level.channels, attention=level.attention)
                channels = level.channels
        return enc

    def decoder(self, encoder: nn.ModuleDict, after: Callable[[Level, int], dict[str, nn.Module]] = nothing) -> nn.ModuleDict:
        """The blocks of the levels, the coarsest first; after(level, its channels) follows each level's."""
        skips = skip_channels(encoder)
        dec, channels = nn.ModuleDict(), skips[-1]
        for level in reversed(self.levels):
            if level is self.levels[-1]:
                dec[f"{level.name}_in0"] = self.block(channels, channels, attention=True)
                dec[f"{level.name}_in1"] = self.block(channels, channels)
            else:
                dec[f"{level.name}_up"] = self.block(channels, channels, up=True)
            for index in range(self.num_blocks + 1):
                attends = level.attention and (self.attend_often or index == self.num_blocks)
                dec[f"{level.name}_block{index}"] = self.block(channels + skips.pop(), level.channels, attention=attends)
                channels = level.channels
            dec.update(after(level, channels))
        return dec


def skip_channels(encoder: nn.ModuleDict) -> list[int]:
    """The channels of every feature that the decoder takes back, the bottleneck's last."""
    blocks = [block for name, block in encoder.items() if "_aux_" not in name]
    return [int(block.out_channels) for block in blocks]  # type: ignore[arg-type]


def ascend(block: UNetBlock, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
    """Through a decoder's block, joined by the last of the skips where the block has channels for it."""
    if x.shape[1] != block.in_channels:
        x = torch.cat([x, skips.pop()], dim=1)
    out: Tensor = block(x, emb)
    return out
