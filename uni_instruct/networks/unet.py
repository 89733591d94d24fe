"""The layout of EDM's and EDM2's U-Nets: blocks at several levels of resolution, on the way down and up again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from uni_instruct.errors import RequestError
from uni_instruct.networks.blocks import UNetBlock
from uni_instruct.spec import ImageShape


class Level(NamedTuple):
    """One resolution of a U-Net: its name in EDM's parameters, its channels, and whether its blocks have attention."""

    name: str
    channels: int
    attention: bool


class ResolutionError(RequestError):
    """The resolution cannot be halved level_count - 1 times, as level_count levels need."""

    def __init__(self, height: int, width: int, level_count: int):
        self.level_count, self.divisor = level_count, 2 ** (level_count - 1)
        super().__init__(
            f"resolution {width}x{height} is not divisible by {self.divisor}",
            remedy=f"use fewer than {level_count} levels or resize the data",
        )


def levels(
    image_shape: ImageShape, model_channels: int, channel_mult: Sequence[int], attn_resolutions: Sequence[int]
) -> list[Level]:
    """The levels of a U-Net, the finest first. Raises ResolutionError if the resolution cannot be halved that often."""
    _, height, width = image_shape
    if not channel_mult:
        raise RequestError("channel_mult is empty", remedy="give one multiplier a level", param="network")
    divisor = 2 ** (len(channel_mult) - 1)
    if height % divisor or width % divisor:
        raise ResolutionError(height, width, len(channel_mult))
    # EDM names its levels '32x32', '16x16', ...; images that are not square are named in the same way, as HxW.
    return [
        Level(f"{height >> index}x{width >> index}", model_channels * mult, (height >> index) in attn_resolutions)
        for index, mult in enumerate(channel_mult)
    ]


def no_extra_modules(*_: object) -> dict[str, nn.Module]:
    """No modules in addition to a level's blocks, for any arguments: the default for `extra_modules` and `after` below."""
    return {}


@dataclass(frozen=True, kw_only=True)
class UNetLayout:
    """The arrangement of a U-Net's blocks: each level has num_blocks on the way down and num_blocks + 1 on the way up.

    levels: the finest first. block(in_channels, out_channels, ...) makes a block, with the keywords up, down and attention.
    full_decoder_attention: in the decoder, all blocks of a level with attention have it; otherwise only the last block.
    """

    levels: list[Level]
    num_blocks: int
    block: Callable[..., nn.Module]
    full_decoder_attention: bool

    def encoder(
        self, stem: nn.Module, extra_modules: Callable[[str, int, int], dict[str, nn.Module]] = no_extra_modules
    ) -> nn.ModuleDict:
        """The stem and the blocks of every level, by EDM's names.

        extra_modules(level name, channels entering the level above, channels entering this level) returns further modules of a
        level. They are inserted after the block that halves the resolution.
        """
        enc = nn.ModuleDict({f"{self.levels[0].name}_conv": stem})
        above, channels = int(stem.in_channels), int(stem.out_channels)  # type: ignore[arg-type]
        for level in self.levels:
            if level is not self.levels[0]:
                enc[f"{level.name}_down"] = self.block(channels, channels, down=True)
                enc.update(extra_modules(level.name, above, channels))
                above = channels
            for index in range(self.num_blocks):
                enc[f"{level.name}_block{index}"] = self.block(channels, level.channels, attention=level.attention)
                channels = level.channels
        return enc

    def decoder(
        self, encoder: nn.ModuleDict, after: Callable[[Level, int], dict[str, nn.Module]] = no_extra_modules
    ) -> nn.ModuleDict:
        """Every level's blocks, the coarsest first. after(level, channels) returns the modules that follow a level's blocks."""
        skips = skip_channels(encoder)
        dec, channels = nn.ModuleDict(), skips[-1]
        for level in reversed(self.levels):
            if level is self.levels[-1]:  # as in EDM, the decoder starts with two blocks, the first always with attention
                dec[f"{level.name}_in0"] = self.block(channels, channels, attention=True)
                dec[f"{level.name}_in1"] = self.block(channels, channels)
            else:
                dec[f"{level.name}_up"] = self.block(channels, channels, up=True)
            # One block more than in the encoder, since there is one more skip: from the block that halves, or from the stem.
            for index in range(self.num_blocks + 1):
                attends = level.attention and (self.full_decoder_attention or index == self.num_blocks)
                dec[f"{level.name}_block{index}"] = self.block(channels + skips.pop(), level.channels, attention=attends)
                channels = level.channels
            dec.update(after(level, channels))
        return dec


def skip_channels(encoder: nn.ModuleDict) -> list[int]:
    """The channels of each skip connection from encoder to decoder; the last is the bottleneck's."""
    # The additional modules of a level (`_aux_`) change a feature and add no skip connection.
    blocks = [block for name, block in encoder.items() if "_aux_" not in name]
    return [int(block.out_channels) for block in blocks]  # type: ignore[arg-type]


def run_decoder_block(block: UNetBlock, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
    """Apply a decoder's block to x. If it has more input channels than x, the last skip is taken off the list and appended."""
    if x.shape[1] != block.in_channels:
        x = torch.cat([x, skips.pop()], dim=1)
    out: Tensor = block(x, emb)
    return out
