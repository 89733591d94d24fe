"""Residual blocks of DDPM++, NCSN++ and ADM with the embedding, skip_scale and attention's order folded into their layers."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.networks.blocks import Conv2d, UNetBlock
from uni_instruct.networks.group_norm import GroupNorm

# The form of a group normalisation that a target is fast at, with the weights of one of ours.
NormFactory = Callable[[GroupNorm], GroupNorm]


class FourDimensionalNorm(GroupNorm):
    """Group normalisation whose every tensor has four dimensions, so that a runtime never changes its layout.

    With m and q the means of x and x^2 over a group and r = (q - m^2 + eps)^-0.5: y = x s + t, s = w r, t = b - w m r. So x
    is read three times and written once; the rest has one pixel. Means over a group's channels, and the way back to channels
    with w, are 1x1 convolutions.
    """

    gather: Tensor
    spread: Tensor
    minus: Tensor

    def __init__(self, norm: GroupNorm):
        nn.Module.__init__(self)
        self.num_groups, self.num_channels, self.eps, self.affine = norm.num_groups, norm.num_channels, norm.eps, norm.affine
        groups, size = norm.num_groups, norm.num_channels // norm.num_groups
        member = torch.eye(groups, dtype=norm.weight.dtype).repeat_interleave(size, dim=1)[:, :, None, None]
        self.register_buffer("gather", member / size)
        self.register_buffer("spread", member.transpose(0, 1) * norm.weight.detach()[:, None, None, None])
        self.register_buffer("minus", -torch.ones(1, groups, 1, 1))
        self.bias = nn.Parameter(norm.bias.detach().clone())

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """[B, C, H, W]; with silu, through SiLU as well."""
        scale, shift = self.scale_and_shift(x)
        return _affine(x, scale, shift, silu)

    def of_sum(self, x: Tensor, added: Tensor) -> Tensor:
        """SiLU of the normalised x + added, added [B, C, 1, 1]: the sum itself is never made."""
        scale, shift = self.scale_and_shift(x, added)
        return _affine(x, scale, shift + added * scale, silu=True)

    def scale_and_shift(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """s and t of x + added, [B, C, 1, 1] each."""
        mean = x.mean((2, 3), keepdim=True)
        # A norm is a reduction by itself: x * x would be written and read again.
        length = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        square = length * length * (1 / (x.shape[2] * x.shape[3]))
        if added is not None:
            square = square + added * (added + mean + mean)
            mean = mean + added
        mean, square = F.conv2d(mean, self.gather), F.conv2d(square, self.gather)
        # No subtraction, no product with one number: OpenVINO replaces them, and loses what says that they need 32 bits.
        rstd = (square + mean * mean * self.minus + self.eps).pow(-0.5)
        return F.conv2d(rstd, self.spread), F.conv2d(mean * rstd, -self.spread, self.bias)


def _affine(x: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> Tensor:
    moved = x * scale + shift
    return F.silu(moved) if silu else moved


class FoldedBlock(UNetBlock):
    """x [B, in_channels, H, W], rows [B, total] -> [B, out_channels, H', W']. place: this block's part of the rows.

    Of an additive block the part is added after the first convolution; of an adaptive one it is the scale and the shift of the
    second normalisation. Where there is but one `row`, it becomes part of the weights and the rows are not read.
    """

    place: slice | None = None

    def __init__(self, block: UNetBlock, norm: NormFactory, row: Tensor | None):
        nn.Module.__init__(self)
        self.in_channels, self.out_channels = block.in_channels, block.out_channels
        self.adaptive_scale, self.skip_scale, self.heads = block.adaptive_scale, block.skip_scale, block.heads
        self.norm0, self.conv0, self.norm1 = norm(block.norm0), copy.deepcopy(block.conv0), norm(_second_norm(block, row))
        if row is not None and not self.adaptive_scale:
            assert self.conv0.bias is not None
            self.conv0.bias.add_(row)
        self.conv1, self.skip = _scaled(block.conv1, self.skip_scale), None
        if block.skip is not None:
            self.skip = _scaled(block.skip, self.skip_scale)
            # A 1x1 convolution commutes with repeating pixels, and has a quarter of them to go through before it.
            self.skip.convolve_first |= self.skip.up and self.skip._repeats
        self.norm2 = self.qkv = self.proj = None
        if block.norm2 is not None and block.qkv is not None and block.proj is not None:
            self.norm2, self.proj = norm(block.norm2), _scaled(block.proj, self.skip_scale)
            self.qkv = copy.deepcopy(block.qkv)
            for parameter in (self.qkv.weight, self.qkv.bias):
                assert parameter is not None
                parameter.copy_(sorted_qkv(parameter, self.heads))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """As the class says."""
        hidden = self._condition(self.conv0(self.norm0(x, silu=True)), rows)
        skip = x * self.skip_scale if self.skip is None and self.skip_scale != 1 else x
        x = self.conv1(hidden) + (skip if self.skip is None else self.skip(x))
        if self.norm2 is None or self.qkv is None or self.proj is None:
            return x
        attended = self.proj(attend(self.qkv(self.norm2(x)), self.heads))
        return attended + (x if self.skip_scale == 1 else x * self.skip_scale)

    def _condition(self, hidden: Tensor, rows: Tensor) -> Tensor:
        if self.place is None:
            return self.norm1(hidden, silu=True)
        part = rows[:, self.place, None, None]
        norm = self.norm1
        if not isinstance(norm, FourDimensionalNorm):
            if not self.adaptive_scale:
                return norm(hidden + part, silu=True)
            scale, shift = part.chunk(2, dim=1)
            return F.silu(norm(hidden) * scale + shift)
        if not self.adaptive_scale:
            return norm.of_sum(hidden, part)
        scale, shift = part.chunk(2, dim=1)
        own_scale, own_shift = norm.scale_and_shift(hidden)
        return _affine(hidden, own_scale * scale, own_shift * scale + shift, silu=True)


def row_map(block: UNetBlock) -> tuple[Tensor, Tensor]:
    """What the block reads of an embedding e, as W e + b: W [n, emb_channels], b [n].

    Adaptive: silu(norm(h) (s + 1) + t) with norm(h) = w n(h) + v is silu(n(h) w (s + 1) + v (s + 1) + t), n without weights.
    """
    weight, bias = block.affine.weight, block.affine.bias
    if not block.adaptive_scale:
        return weight, bias
    (weight_s, weight_t), (bias_s, bias_t) = weight.chunk(2), bias.chunk(2)
    w, v = block.norm1.weight, block.norm1.bias
    weights = torch.cat([w[:, None] * weight_s, v[:, None] * weight_s + weight_t])
    return weights, torch.cat([w * (bias_s + 1), v * (bias_s + 1) + bias_t])


def sorted_qkv(parameter: Tensor, heads: int) -> Tensor:
    """A parameter of EDM's qkv layer, which interleaves q, k and v in each head, with all of q first, then k, then v."""
    return torch.cat([part.flatten(0, 1) for part in parameter.unflatten(0, (heads, -1, 3)).unbind(2)])


def attend(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q^T k / sqrt(c)) v in each head of c channels, q, k and v side by side: [B, 3 C, H, W] -> [B, C, H, W]."""
    batch, channels, height, width = qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:]
    q, k, v = qkv.reshape(batch, 3 * heads, channels // heads, height * width).chunk(3, dim=1)
    weights = (q.transpose(2, 3) @ k * q.shape[2] ** -0.5).softmax(dim=3)
    return (v @ weights.transpose(2, 3)).reshape(batch, channels, height, width)


def _second_norm(block: UNetBlock, row: Tensor | None) -> GroupNorm:
    if not block.adaptive_scale:
        return block.norm1
    norm = copy.deepcopy(block.norm1)
    weight, bias = (torch.ones_like(norm.weight), torch.zeros_like(norm.bias)) if row is None else row.chunk(2)
    norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
    return norm


def _scaled(conv: Conv2d, factor: float) -> Conv2d:
    """The convolution, its output times factor; one without weights, which resamples, cannot be scaled."""
    assert conv.weight is not None or factor == 1
    made = copy.deepcopy(conv)
    for parameter in made.parameters():
        parameter.mul_(factor)
    return made
