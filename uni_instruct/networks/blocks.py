"""Building blocks of EDM's U-Nets: parameter names and arithmetic as in EDM, so that its weights load unchanged."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.errors import RequestError
from uni_instruct.networks.group_norm import GroupNorm

# A function that initialises a weight and, unless it is None, a bias, in place.
Init = Callable[[Tensor, Tensor | None], None]


# U(-b, b), b = gain sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010).
def xavier_(weight: Tensor, bias: Tensor | None, gain: float = 1.0) -> None:
    """Xavier-uniform weights with fans over the whole kernel, times gain; zero biases. Used by DDPM++ and NCSN++."""
    nn.init.xavier_uniform_(weight)
    with torch.no_grad():
        weight.mul_(gain)
    if bias is not None:
        nn.init.zeros_(bias)


# U(-b, b), b = 1 / sqrt(fan_in).
@torch.no_grad()
def fan_in_(weight: Tensor, bias: Tensor | None) -> None:
    """Weights and biases uniform within 1 / sqrt(fan-in): Kaiming's with a gain of sqrt(1/3). Used by ADM."""
    bound = math.prod(weight.shape[1:]) ** -0.5
    for parameter in (weight, bias):
        if parameter is not None:
            parameter.uniform_(-bound, bound)


@torch.no_grad()
def zero_(weight: Tensor, bias: Tensor | None) -> None:
    """Zero weights and biases, for the last layer of each branch in ADM, so that each block starts as the identity."""
    for parameter in (weight, bias):
        if parameter is not None:
            parameter.zero_()


class Linear(nn.Linear):
    """A fully connected layer with Xavier-uniform weights and zero bias, unless `init` says otherwise."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, init: Init = xavier_):
        super().__init__(in_features, out_features, bias)
        init(self.weight, self.bias)

    def reset_parameters(self) -> None:
        """Do nothing: the base class's constructor calls this, but `init` sets the weights."""


class Conv2d(nn.Module):
    """Convolution with optional resampling by a separable filter before it.

    up, down: double or halve the resolution. The default filter (1, 1) repeats pixels or averages four.
    kernel: 0 resamples only. convolve_first: convolve before halving (EDM's fused_resample). The convolution then computes a
    margin beyond the border, which the filter needs.
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
        convolve_first: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        init: Init = xavier_,
    ):
        super().__init__()
        assert not (up and (down or convolve_first))
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.convolve_first = up, down, convolve_first
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(out_channels)) if kernel else None
        if self.weight is not None:
            init(self.weight, self.bias)
        # Always on the CPU: arithmetic on the "meta" device imports torch's compiler, which takes a second.
        taps = torch.tensor(resample_filter, dtype=torch.float32, device="cpu")
        taps = torch.outer(taps, taps)[None, None] / taps.sum() ** 2
        self.register_buffer("resample_filter", taps if up or down else None)
        # The default filter repeats a pixel or averages four. Without a depthwise convolution, CPUs do this many times faster.
        self._repeats = tuple(resample_filter) == (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H', W'], H' = 2 H, H / 2 or H."""
        if self.resample_filter is None:
            return self._convolve(x)
        taps = self.resample_filter.to(x.dtype)
        reach = (taps.shape[-1] - 1) // 2
        if self.convolve_first:
            return self._resample(self._convolve(x, margin=reach), taps, padding=0)
        return self._convolve(self._resample(x, taps, padding=reach))

    def _convolve(self, x: Tensor, margin: int = 0) -> Tensor:
        if self.weight is None or self.bias is None:
            return x
        padding = self.weight.shape[-1] // 2 + margin
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=padding)

    def _resample(self, x: Tensor, taps: Tensor, padding: int) -> Tensor:
        if self._repeats:
            return F.interpolate(x, scale_factor=2.0) if self.up else F.avg_pool2d(x, 2)
        channels = x.shape[1]
        depthwise = taps.expand(channels, 1, -1, -1)
        # Times 4: the taps sum to 1, but the zeros between the inputs leave a quarter of that sum for each output.
        if self.up:
            return F.conv_transpose2d(x, depthwise * 4, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, depthwise, stride=2, padding=padding, groups=channels)


# sin(c w_i), cos(c w_i), w_i = 10000^(-i / n) (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).
class PositionalEmbedding(nn.Module):
    """Sinusoids of the noise label at geometric frequencies from 1 to 1/10000: [B] -> [B, channels].

    endpoint: whether 1/10000 is the last frequency; otherwise the sequence stops one frequency before it.
    """

    def __init__(self, channels: int, *, endpoint: bool = True, cosines_first: bool = False):
        super().__init__()
        self.channels, self.endpoint, self.cosines_first = channels, endpoint, cosines_first

    def forward(self, noise_labels: Tensor) -> Tensor:
        """noise_labels: float32 [B]."""
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=noise_labels.device) / (half - self.endpoint)
        angles = torch.outer(noise_labels, ((1 / 10000) ** steps).to(noise_labels.dtype))
        waves = [angles.sin(), angles.cos()]
        return torch.cat(waves[::-1] if self.cosines_first else waves, dim=1)


# sin(2 pi f c), cos(2 pi f c), f ~ N(0, 16^2) (Tancik et al. 2020, arXiv 2006.10739; Song et al. 2021, arXiv 2011.13456).
class FourierEmbedding(nn.Module):
    """Sines, then cosines, of the noise label at fixed random frequencies with standard deviation 16: [B] -> [B, channels]."""

    freqs: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, noise_labels: Tensor) -> Tensor:
        """noise_labels: float32 [B]."""
        angles = torch.outer(noise_labels, (2 * math.pi * self.freqs).to(noise_labels.dtype))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


@dataclass(frozen=True, kw_only=True)
class BlockStyle:
    """The settings that all blocks of one architecture share.

    adaptive_scale: the embedding scales and shifts the output of the second normalisation; otherwise it is added before it.
    channels_per_head: the minimum for an attention head; None means a single head.
    skip_scale: factor of the sum of a branch and its input. eps: of the normalisations.
    project_resampled: a resampling block's skip path has a 1x1 convolution even if the number of channels does not change.
    init: initial weights. init_qkv: of the attention's first layer. init_last: of the last layer of each branch.
    """

    adaptive_scale: bool
    channels_per_head: int | None
    skip_scale: float
    eps: float
    project_resampled: bool
    init: Init
    init_qkv: Init
    init_last: Init

    def heads(self, channels: int) -> int:
        """The number of attention heads; 0 if there are fewer channels than one head needs, as in EDM."""
        heads = channels // self.channels_per_head if self.channels_per_head else 1
        if heads and channels % heads:
            raise RequestError(
                f"{channels} channels do not divide into {heads} heads",
                # A multiple of 32 too, because a normalisation has up to 32 groups.
                remedy=f"make model_channels a multiple of {math.lcm(self.channels_per_head or 1, 32)}",
                param="network",
            )
        return heads


class UNetBlock(nn.Module):
    """Residual block conditioned on the embedding, with optional resampling and self-attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        style: BlockStyle,
        dropout: float,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        resample_filter: Sequence[float] = (1, 1),
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.dropout = in_channels, out_channels, dropout
        self.adaptive_scale, self.skip_scale = style.adaptive_scale, style.skip_scale
        self.heads = style.heads(out_channels) if attention else 0
        resampling = partial(Conv2d, up=up, down=down, resample_filter=resample_filter, init=style.init)
        self.norm0 = GroupNorm(in_channels, style.eps)
        self.conv0 = resampling(in_channels, out_channels, 3)
        self.affine = Linear(emb_channels, out_channels * (2 if self.adaptive_scale else 1), init=style.init)
        self.norm1 = GroupNorm(out_channels, style.eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init=style.init_last)
        projects = style.project_resampled or in_channels != out_channels
        needs_skip = in_channels != out_channels or up or down
        self.skip = resampling(in_channels, out_channels, 1 if projects else 0) if needs_skip else None
        self.norm2 = GroupNorm(out_channels, style.eps) if self.heads else None
        self.qkv = Conv2d(out_channels, 3 * out_channels, 1, init=style.init_qkv) if self.heads else None
        self.proj = Conv2d(out_channels, out_channels, 1, init=style.init_last) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W']."""
        hidden = self.conv0(self.norm0(x, silu=True))
        hidden = self._condition(hidden, self.affine(emb)[:, :, None, None].to(hidden.dtype))
        hidden = self.conv1(F.dropout(hidden, self.dropout, self.training))
        x = self._sum(hidden, x if self.skip is None else self.skip(x))
        return x if self.qkv is None else self._sum(self._attend(x), x)

    def _condition(self, hidden: Tensor, affine: Tensor) -> Tensor:
        if not self.adaptive_scale:
            return self.norm1(hidden + affine, silu=True)
        # (1 + scale) norm(h) + shift: adaptive group normalisation (Dhariwal and Nichol 2021, arXiv 2105.05233, section 3.1).
        scale, shift = affine.chunk(2, dim=1)
        return F.silu(torch.addcmul(shift, self.norm1(hidden), scale + 1))

    def _sum(self, branch: Tensor, x: Tensor) -> Tensor:
        return branch + x if self.skip_scale == 1 else (branch + x) * self.skip_scale

    def _attend(self, x: Tensor) -> Tensor:
        assert self.norm2 is not None
        assert self.qkv is not None
        assert self.proj is not None
        # EDM interleaves q, k and v within each head: output 3 c of a head's part of qkv is channel c of its q.
        qkv = self.qkv(self.norm2(x)).unflatten(1, (self.heads, self.out_channels // self.heads, 3)).flatten(4)
        q, k, v = qkv.transpose(2, 4).unbind(3)
        return self.proj(attention(q, k, v).transpose(2, 3).reshape(x.shape))


# softmax(q k^T / sqrt(C)) v (Vaswani et al. 2017, arXiv 1706.03762, equation 1).
def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of queries, keys and values [B, heads, N, C]: returns the same shape."""
    if q.dtype == torch.bfloat16 and q.device.type != "cuda":
        # Torch's fused CPU kernel takes three times as long as these products, forward and backward.
        weights = (q @ k.transpose(2, 3)).mul(q.shape[-1] ** -0.5).softmax(dim=3)
        return weights @ v
    return F.scaled_dot_product_attention(q, k, v)
