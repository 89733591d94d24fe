"""EDM2's network (arXiv 2312.02696) with gains, weight normalisation and constant factors folded into plain convolutions."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.export.canonical_blocks import attend, sorted_qkv
from uni_instruct.networks.edm2 import EDM2, Block, MPConv, normalised, resample

SILU_GAIN = 1 / 0.596  # mp_silu(x) = silu(x) / 0.596 (equation 81), folded into the convolution that follows


class PlainConv(MPConv):
    """A plain convolution with the normalised weights of an MPConv, times a factor."""

    def __init__(self, conv: MPConv, factor: float = 1.0):
        nn.Module.__init__(self)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.weight = nn.Parameter(effective_weight(conv) * factor)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W]. gain is ignored, as it is folded into the weights."""
        return F.conv2d(x, self.weight, padding=self.weight.shape[-1] // 2)


class FoldedEDM2Block(Block):
    """A folded block: x [B, in_channels, H, W], rows [B, total] -> [B, out_channels, H', W'].

    place: this block's scales in the rows. `row` is given if there are no classes: it is folded into the weights, and the rows
    are not read.
    """

    place: slice | None = None

    def __init__(self, block: Block, row: Tensor | None):
        nn.Module.__init__(self)
        for name in ("in_channels", "out_channels", "is_decoder", "up", "down", "clip_act", "resample_filter", "heads"):
            setattr(self, name, getattr(block, name))
        (self.keep_res, res), (self.keep_attn, attn) = mp_sum_factors(block.res_balance), mp_sum_factors(block.attn_balance)
        self.conv_res0 = PlainConv(block.conv_res0, SILU_GAIN)
        if row is not None:
            self.conv_res0.weight.mul_(row[:, None, None, None])
        self.conv_res1 = PlainConv(block.conv_res1, SILU_GAIN * res)
        self.conv_skip = self.attn_qkv = self.attn_proj = None
        if block.conv_skip is not None:
            self.conv_skip = PlainConv(block.conv_skip, self.keep_res if self.is_decoder else 1.0)
        if block.attn_qkv is not None and block.attn_proj is not None:
            self.attn_qkv, self.attn_proj = PlainConv(block.attn_qkv), PlainConv(block.attn_proj, attn)
            self.attn_qkv.weight.copy_(sorted_qkv(self.attn_qkv.weight, self.heads))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """The block's output; shapes as in the class docstring."""
        if self.up or self.down:
            x = resample(x, self.resample_filter, up=self.up)
        if not self.is_decoder:
            x = normalised(x if self.conv_skip is None else self.conv_skip(x), (1,))
        hidden = self.conv_res0(F.silu(x))
        if self.place is not None:
            hidden = hidden * rows[:, self.place, None, None]
        hidden = self.conv_res1(F.silu(hidden))
        x = (self.conv_skip(x) if self.is_decoder and self.conv_skip is not None else x * self.keep_res) + hidden
        if self.attn_qkv is not None and self.attn_proj is not None:
            x = x * self.keep_attn + self.attn_proj(attend(self._unit_qkv(self.attn_qkv(x)), self.heads))
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _unit_qkv(self, qkv: Tensor) -> Tensor:
        """Normalise queries, keys and values to magnitude 1, in each head and pixel."""
        return normalised(qkv.unflatten(1, (3 * self.heads, -1)), (2,)).flatten(1, 2)


def row_map(block: Block) -> tuple[Tensor, Tensor]:
    """W [out_channels, emb_channels] and b [out_channels] such that W e + b are the block's scales, for an embedding e."""
    # EDM2 multiplies by emb_linear(e, gain=emb_gain) + 1.
    weight = effective_weight(block.emb_linear) * block.emb_gain
    return weight, torch.ones(len(weight), dtype=weight.dtype)


def mp_sum_factors(balance: float) -> tuple[float, float]:
    """The factors of a and b in mp_sum(a, b, t) = ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2) (equation 88)."""
    return (1 - balance) / math.hypot(1 - balance, balance), balance / math.hypot(1 - balance, balance)


def effective_weight(conv: MPConv) -> Tensor:
    """The weights that an MPConv multiplies by at gain 1: W / |W| for each output (equation 47)."""
    weight = conv.weight.detach()
    return normalised(weight, tuple(range(1, weight.ndim))) / math.sqrt(weight[0].numel())


def fold_ends(model: EDM2, c_in: float, c_out: float, channels: int) -> None:
    """Fold c_in into the stem, except for its last input channel, which is all ones; c_out and out_gain into the last layer."""
    name, stem = next(iter(model.enc.items()))
    assert isinstance(stem, MPConv)
    model.enc[name] = plain = PlainConv(stem)
    plain.weight[:, :channels].mul_(c_in)
    model.out_conv = PlainConv(model.out_conv, float(model.out_gain) * c_out)
