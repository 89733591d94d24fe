"""Residual blocks of DDPM++, NCSN++ and ADM, with embedding, skip_scale and the order of q, k, v folded into their weights."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.networks.blocks import Conv2d, UNetBlock
from uni_instruct.networks.group_norm import GroupNorm

# Converts a group normalisation of this package to the form for which a runtime is fast, with the same weights.
NormFactory = Callable[[GroupNorm], GroupNorm]


class FourDimensionalNorm(GroupNorm):
    """Group normalisation in which all tensors have four dimensions, so that a runtime never changes the layout of x.

    With m and q the means of x and x^2 over a group, and r = (q - m^2 + eps)^-0.5: y = x s + t, s = w r, t = b - w m r.

    So x is read three times, and y written once; all other tensors have one pixel. 1x1 convolutions compute the means over a
    group's channels (`gather`), and expand from groups to channels and multiply by w (`spread`). minus: -1 for each group.
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
        """The normalised x, [B, C, H, W]; with silu, SiLU of it."""
        scale, shift = self.scale_and_shift(x)
        return _affine(x, scale, shift, silu)

    def of_sum(self, x: Tensor, added: Tensor) -> Tensor:
        """SiLU of the normalised x + added, with added [B, C, 1, 1]. The sum x + added is never stored."""
        # y = (x + a) s + t = x s + (t + a s)
        scale, shift = self.scale_and_shift(x, added)
        return _affine(x, scale, shift + added * scale, silu=True)

    def scale_and_shift(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """s and t of the normalisation of x + added, [B, C, 1, 1] each."""
        mean = x.mean((2, 3), keepdim=True)
        # The mean of x^2 as ||x||^2 / (H W): a norm is one reduction, while x * x would be stored and read again.
        length = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        square = length * length * (1 / (x.shape[2] * x.shape[3]))
        if added is not None:
            # E[(x + a)^2] = E[x^2] + a (a + 2 E[x])
            square = square + added * (added + mean + mean)
            mean = mean + added
        mean, square = F.conv2d(mean, self.gather), F.conv2d(square, self.gather)
        # No subtraction, no product with a single number: OpenVINO would replace these operators, and lose the marks that keep
        # them in float32 (mixed_precision.py).
        rstd = (square + mean * mean * self.minus + self.eps).pow(-0.5)
        return F.conv2d(rstd, self.spread), F.conv2d(mean * rstd, -self.spread, self.bias)


def _affine(x: Tensor, scale: Tensor, shift: Tensor, silu: bool) -> Tensor:
    moved = x * scale + shift
    return F.silu(moved) if silu else moved


class FoldedBlock(UNetBlock):
    """A folded residual block: x [B, in_channels, H, W], rows [B, total] -> [B, out_channels, H', W'].

    place: this block's part of the rows. An additive block adds its part after the first convolution; in an adaptive block, it
    is the scale and shift of the second normalisation. `row` is given if there are no classes: it is folded into the weights,
    and the rows are not read.
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
            # A 1x1 convolution commutes with repeating pixels, and before that it has only a quarter of the pixels to process.
            self.skip.convolve_first |= self.skip.up and self.skip._repeats
        self.norm2 = self.qkv = self.proj = None
        if block.norm2 is not None and block.qkv is not None and block.proj is not None:
            self.norm2, self.proj = norm(block.norm2), _scaled(block.proj, self.skip_scale)
            self.qkv = copy.deepcopy(block.qkv)
            for parameter in (self.qkv.weight, self.qkv.bias):
                assert parameter is not None
                parameter.copy_(sorted_qkv(parameter, self.heads))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """The block's output; shapes as in the class docstring."""
        hidden = self._condition(self.conv0(self.norm0(x, silu=True)), rows)
        # y = skip_scale (conv1(hidden) + x): the scale is in the weights of conv1 and skip, if there is a skip convolution.
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
    """W [n, emb_channels] and b [n] such that W e + b is the block's row, for an embedding e.

    An adaptive block computes silu(norm(h) (s + 1) + t). With norm(h) = w n(h) + v, n without weights, this is
    silu(n(h) w (s + 1) + v (s + 1) + t). So the row is the scale w (s + 1) and the shift v (s + 1) + t, for n.
    """
    weight, bias = block.affine.weight, block.affine.bias
    if not block.adaptive_scale:
        return weight, bias
    (weight_s, weight_t), (bias_s, bias_t) = weight.chunk(2), bias.chunk(2)
    w, v = block.norm1.weight, block.norm1.bias
    weights = torch.cat([w[:, None] * weight_s, v[:, None] * weight_s + weight_t])
    return weights, torch.cat([w * (bias_s + 1), v * (bias_s + 1) + bias_t])


def sorted_qkv(parameter: Tensor, heads: int) -> Tensor:
    """Reorder a parameter of EDM's qkv layer, where q, k and v alternate in each head: all of q first, then k, then v."""
    return torch.cat([part.flatten(0, 1) for part in parameter.unflatten(0, (heads, -1, 3)).unbind(2)])


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Attention, softmax(q^T k / sqrt(c)) v in each head of c channels: [B, 3 C, H, W] (q, k, v in turn) -> [B, C, H, W]."""
    batch, channels, height, width = qkv.shape[0], qkv.shape[1] // 3, *qkv.shape[2:]
    q, k, v = qkv.reshape(batch, 3 * heads, channels // heads, height * width).chunk(3, dim=1)
    weights = (q.transpose(2, 3) @ k * q.shape[2] ** -0.5).softmax(dim=3)
    return (v @ weights.transpose(2, 3)).reshape(batch, channels, height, width)


def _second_norm(block: UNetBlock, row: Tensor | None) -> GroupNorm:
    if not block.adaptive_scale:
        return block.norm1
    # The norm's weights are part of the row (`row_map`): without classes the row is folded back, else the norm has none.
    norm = copy.deepcopy(block.norm1)
    weight, bias = (torch.ones_like(norm.weight), torch.zeros_like(norm.bias)) if row is None else row.chunk(2)
    norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
    return norm


def _scaled(conv: Conv2d, factor: float) -> Conv2d:
    """A copy of the convolution with its output multiplied by factor. One that only resamples has no weights to scale."""
    assert conv.weight is not None or factor == 1
    made = copy.deepcopy(conv)
    for parameter in made.parameters():
        parameter.mul_(factor)
    return made
