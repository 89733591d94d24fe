"""Group normalisation as in EDM, with an implementation for the case in which torch's is slow."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNorm(nn.GroupNorm):
    """Group normalisation with at least four channels a group and at most 32 groups, as in EDM."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(max(1, min(32, channels // 4)), channels, eps=eps)

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """Normalise x [B, C, H, W]; with silu, apply SiLU too."""
        if _lacks_kernel(x):
            out: Tensor = ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps, silu)
            return out
        normed = super().forward(x)
        return F.silu(normed) if silu else normed


def _lacks_kernel(x: Tensor) -> bool:
    """Whether torch has no fast kernel for x: bfloat16, channels_last, on the CPU. Torch 2.13 takes up to 20 times as long."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
    return on_cpu and x.is_contiguous(memory_format=torch.channels_last)


# y = (x - mean) / sqrt(var + eps), with mean and variance over the channels of a group and all pixels; the result is
# weight y + bias (Wu and He 2018, arXiv 1803.08494).
class ChannelsLastGroupNorm(torch.autograd.Function):
    """Group normalisation of bfloat16 [B, C, H, W] in channels_last on the CPU, in whole rows of channels.

    The statistics are float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
        """Normalise x; with silu, apply SiLU too."""
        pixels = _rows(x)
        batch, number, channels = pixels.shape
        count = number * channels // groups
        # var = E[x^2] - E[x]^2, from float32 sums over whole rows of channels.
        wide = pixels.float()
        mean = _by_group(wide.sum(1), groups).sum(2, keepdim=True) / count
        square = _by_group(pixels.float().square_().sum(1), groups).sum(2, keepdim=True) / count
        rstd = ((square - mean**2).clamp_(min=0) + eps).rsqrt()
        scale = rstd * weight.view(groups, -1)
        shift = bias.view(groups, -1) - mean * scale
        scale, shift = scale.view(batch, 1, channels), shift.view(batch, 1, channels)
        normed = torch.addcmul(shift, wide, scale, out=wide).to(x.dtype)
        ctx.save_for_backward(pixels, normed if silu else None, weight, mean, rstd)
        ctx.silu = silu
        return _images(F.silu(normed) if silu else normed, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, bias and weight.

        With y = (x - mean) rstd, w the weight and g the gradient of w y + bias, x's is rstd (w g - mean(w g) - y mean(w g y)).
        """
        pixels, normed, weight, mean, rstd = ctx.saved_tensors
        image, grad = grad, _rows(grad)
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, normed)
        groups, count = mean.shape[1], pixels[0].numel() // mean.shape[1]
        weight = weight.view(groups, -1)
        # first and second are the sums of g and g y over the pixels. Summed over the batch they are the gradients of bias and
        # weight. With them the formula above becomes slope x + offset + scale g for each pixel.
        first = _by_group(grad.sum(1, dtype=torch.float32), groups)
        second = (_by_group((grad * pixels).sum(1, dtype=torch.float32), groups) - mean * first) * rstd
        slope = -(rstd**2) * (weight * second).sum(2, keepdim=True) / count
        offset = -rstd * (weight * first).sum(2, keepdim=True) / count - slope * mean
        offset, slope, scale = (
            t.expand_as(first).reshape(len(grad), 1, -1).to(grad.dtype) for t in (offset, slope, rstd * weight)
        )
        moved = torch.addcmul(offset, pixels, slope).addcmul_(grad, scale)
        return _images(moved, image), second.sum(0).flatten(), first.sum(0).flatten(), None, None, None


def _rows(images: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H W, C], without a copy from channels_last."""
    return images.permute(0, 2, 3, 1).flatten(1, 2)


def _images(rows: Tensor, like: Tensor) -> Tensor:
    return rows.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _by_group(values: Tensor, groups: int) -> Tensor:
    """[B, C] as [B, groups, C / groups]."""
    return values.unflatten(1, (groups, -1))
