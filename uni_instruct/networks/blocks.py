"""Building blocks of DDPM++: parameter names and arithmetic as in EDM, so that its weights load unchanged."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.networks.group_norm import GroupNorm


def scaled_xavier_(weight: Tensor, gain: float) -> None:
    """Xavier-uniform with fans over the whole kernel, times gain."""
    nn.init.xavier_uniform_(weight)
    with torch.no_grad():
        weight.mul_(gain)


class Linear(nn.Linear):
    """Fully connected, Xavier-uniform weights, zero bias."""

    def reset_parameters(self) -> None:
        """Called by the base class when built."""
        scaled_xavier_(self.weight, 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Conv2d(nn.Module):
    """Convolution after optional resampling by a separable filter (nearest and average for the default filter).

    kernel 0 resamples only. gain scales the Xavier-uniform weights.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        gain: float = 1.0,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down = up, down
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None
        if self.weight is not None:
            scaled_xavier_(self.weight, gain)
        taps = torch.tensor(resample_filter, dtype=torch.float32)
        taps = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
        self.register_buffer("resample_filter", taps if up or down else None)
        # The default filter repeats pixels and averages four, which CPUs do many times as fast as a depthwise convolution.
        self._repeats = tuple(resample_filter) == (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H', W'], H' = 2 H, H / 2 or H."""
        if self.resample_filter is not None:
            x = self._resample(x, self.resample_filter.to(x.dtype))
        if self.weight is None or self.bias is None:
            return x
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.weight.shape[-1] // 2)

    def _resample(self, x: Tensor, taps: Tensor) -> Tensor:
        if self._repeats:
            return F.interpolate(x, scale_factor=2.0) if self.up else F.avg_pool2d(x, 2)
        channels, padding = self.in_channels, (taps.shape[-1] - 1) // 2
        depthwise = taps.expand(channels, 1, -1, -1)
        if self.up:
            return F.conv_transpose2d(x, depthwise * 4, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, depthwise, stride=2, padding=padding, groups=channels)


class PositionalEmbedding(nn.Module):
    """Sinusoids of the noise label at geometric frequencies from 1 to 1/10000, sines first: [B] -> [B, channels]."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, noise_labels: Tensor) -> Tensor:
        """noise_labels: float32 [B]."""
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=noise_labels.device) / (half - 1)
        angles = torch.outer(noise_labels, ((1 / 10000) ** steps).to(noise_labels.dtype))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class UNetBlock(nn.Module):
    """Residual block with an additive embedding, optional resampling and single-head self-attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        dropout: float,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        resample_filter: Sequence[float] = (1, 1),
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.dropout = in_channels, out_channels, dropout
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down, resample_filter=resample_filter)
        self.affine = Linear(emb_channels, out_channels)
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=1e-5)
        needs_skip = out_channels != in_channels or up or down
        self.skip = (
            Conv2d(in_channels, out_channels, 1, up=up, down=down, resample_filter=resample_filter) if needs_skip else None
        )
        self.norm2 = GroupNorm(out_channels) if attention else None
        self.qkv = Conv2d(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2)) if attention else None
        self.proj = Conv2d(out_channels, out_channels, 1, gain=1e-5) if attention else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W']."""
        hidden = self.conv0(self.norm0(x, silu=True))
        hidden = self.norm1(hidden + self.affine(emb)[:, :, None, None].to(hidden.dtype), silu=True)
        hidden = self.conv1(F.dropout(hidden, self.dropout, self.training))
        x = (hidden + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        return x if self.qkv is None else self._attend(x)

    def _attend(self, x: Tensor) -> Tensor:
        assert self.norm2 is not None
        assert self.qkv is not None
        assert self.proj is not None
        # EDM interleaves q, k and v: channel c of q is output 3 c of qkv.
        qkv = self.qkv(self.norm2(x)).unflatten(1, (self.out_channels, 3)).flatten(3)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        attended = attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return (self.proj(attended) + x) * math.sqrt(0.5)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v of one head, [B, N, C] each."""
    if q.dtype == torch.bfloat16 and q.device.type != "cuda":
        # Torch's fused CPU kernel takes three times as long as these products, forward and backward.
        weights = torch.bmm(q, k.transpose(1, 2)).mul(q.shape[-1] ** -0.5).softmax(dim=2)
        return torch.bmm(weights, v)
    # One head, as [B, 1, N, C]: the fused kernels and the ONNX exporter take four dimensions only.
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]).squeeze(1)
