"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, arXiv 2312.02696, figure 21).

Equation numbers without another source refer to that paper. Parameter names and arithmetic are those of EDM2's `unet`, so that
its weights load unchanged. The head that estimates the loss's uncertainty (`logvar_*` there) is left out, because only EDM2's
training needs it.
"""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.errors import RequestError
from uni_instruct.networks.blocks import attention
from uni_instruct.networks.network import Network
from uni_instruct.networks.unet import UNetLayout, levels
from uni_instruct.spec import ImageShape

EPS = 1e-4  # added to each magnitude before a division by it
UNIT_TOLERANCE = 1e-5  # weights whose magnitude is this close to 1 are not changed at all


class EDM2(Network):
    """The U-Net F(x; noise label, class). Level i: resolution >> i, model_channels * channel_mult[i] channels.

    channel_mult_noise: sets the channels of the noise label's features; None uses the first level's.
    channel_mult_emb: sets the channels of the embedding; None uses the widest level's.
    label_balance, concat_balance, res_balance, attn_balance: from 0 (only the main branch) to 1 (only the other branch).
    clip_act: limit of the activations' absolute value; None for no limit.
    channels_per_head: a block with fewer channels has no attention, as in EDM2.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int = 0,
        *,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256,
        channels_per_head: int = 64,
        resample_filter: Sequence[float] = (1, 1),
    ):
        super().__init__()
        _check_filter(resample_filter)
        plan = levels(image_shape, model_channels, channel_mult, attn_resolutions)
        image_channels, widths = image_shape[0], [level.channels for level in plan]
        noise_channels = widths[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        self.emb_channels = max(widths) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.label_balance, self.concat_balance = label_balance, concat_balance
        self.emb_fourier = MPFourier(noise_channels)
        self.emb_noise = MPConv(noise_channels, self.emb_channels, 0)
        self.emb_label = MPConv(num_classes, self.emb_channels, 0) if num_classes else None

        block = partial(Block, emb_channels=self.emb_channels, dropout=dropout, resample_filter=tuple(resample_filter))
        block = partial(block, res_balance=res_balance, attn_balance=attn_balance)
        block = partial(block, clip_act=clip_act, channels_per_head=channels_per_head)
        down = UNetLayout(levels=plan, num_blocks=num_blocks, block=block, full_decoder_attention=True)
        self.enc = down.encoder(MPConv(image_channels + 1, widths[0], 3))
        self.bottleneck_channels = widths[-1]
        self.dec = dataclasses.replace(down, block=partial(block, is_decoder=True)).decoder(self.enc)
        self.out_conv = MPConv(widths[0], image_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros([]))

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        """The embedding that every block reads: [B, emb_channels]. augment_labels are ignored.

        Without class_labels the class's embedding is a zero vector. In training mode, weights that have changed are first
        normalised to unit magnitude (equation 66).
        """
        # Inside functorch's transforms, tensors from outside must not be changed in place.
        if self.training and not torch._C._are_functorch_transforms_active():
            # Not as a decorator: that would import torch's compiler, which takes a second, whenever any network is built.
            torch.compiler.disable(self._normalise_weights)()
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            label = torch.zeros_like(emb)
            if class_labels is not None:
                label = self.emb_label(class_labels.to(emb.dtype) * math.sqrt(class_labels.shape[1]))
            emb = mp_sum(emb, label, self.label_balance)
        return mp_silu(emb)

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """All encoder outputs; the last is the bottleneck's. A channel of ones is appended to the image."""
        # The ones replace biases: magnitude-preserving layers have none.
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        features = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, Block) else block(x)
            features.append(x)
        return features

    def decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        """F(x) from the encoder's outputs: [B, C, H, W]."""
        skips, x = list(features), features[-1]
        for block in self.dec.values():
            assert isinstance(block, Block)
            if x.shape[1] != block.in_channels:
                x = mp_cat(x, skips.pop(), self.concat_balance)
            x = block(x, emb)
        out: Tensor = self.out_conv(x, gain=self.out_gain)
        return out

    def _normalise_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, MPConv):
                module.normalise()


class Block(nn.Module):
    """Residual block: the embedding scales the channels, and attention comes last.

    is_decoder: whether it is a decoder's block. An encoder's block normalises its input, and its 1x1 convolution comes first.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        dropout: float,
        res_balance: float,
        attn_balance: float,
        clip_act: float | None,
        channels_per_head: int,
        resample_filter: tuple[float, ...],
        is_decoder: bool = False,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.is_decoder, self.up, self.down = is_decoder, up, down
        self.dropout, self.res_balance, self.attn_balance = dropout, res_balance, attn_balance
        self.clip_act, self.resample_filter = clip_act, resample_filter
        self.heads = out_channels // channels_per_head if attention else 0
        if self.heads and out_channels % self.heads:
            raise RequestError(
                f"{out_channels} channels cannot be divided among {self.heads} attention heads",
                remedy=f"choose a channels_per_head that divides {out_channels}",
                param="network",
            )
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(in_channels if is_decoder else out_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels, 0)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1) if self.heads else None
        self.attn_proj = MPConv(out_channels, out_channels, 1) if self.heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W']."""
        if self.up or self.down:
            x = resample(x, self.resample_filter, up=self.up)
        if not self.is_decoder:
            x = normalised(x if self.conv_skip is None else self.conv_skip(x), (1,))
        hidden = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        hidden = mp_silu(hidden * scale[:, :, None, None].to(hidden.dtype))
        hidden = self.conv_res1(F.dropout(hidden, self.dropout, self.training))
        if self.is_decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, hidden, self.res_balance)
        if self.heads:
            x = mp_sum(x, self._attended(x), self.attn_balance)
        return x if self.clip_act is None else x.clamp(-self.clip_act, self.clip_act)

    def _attended(self, x: Tensor) -> Tensor:
        """Self-attention with queries, keys and values of unit magnitude."""
        assert self.attn_qkv is not None
        assert self.attn_proj is not None
        # EDM2 interleaves q, k and v within each head: qkv is [B, heads, C / heads, 3, H W].
        qkv = normalised(self.attn_qkv(x).flatten(2).unflatten(1, (self.heads, -1, 3)), (2,))
        q, k, v = qkv.transpose(2, 4).unbind(3)
        attended: Tensor = self.attn_proj(attention(q, k, v).transpose(2, 3).reshape(x.shape))
        return attended


# y = W' * x with W' = W / |W| for each output (equation 47); |.| is the norm over an output's weights.
class MPConv(nn.Module):
    """Magnitude-preserving convolution without bias (equation 47); with kernel 0 a fully connected layer.

    Only the direction of each output's weights matters, so training can keep their magnitude at 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *((kernel, kernel) if kernel else ())))
        self._normalised_at = (0, 0)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """[B, in_channels, ...] -> [B, out_channels, ...], multiplied by gain."""
        wide = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        weight = normalised(wide, tuple(range(1, wide.ndim))) * (gain / math.sqrt(wide[0].numel()))
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @torch.no_grad()
    def normalise(self) -> None:
        """Forced weight normalisation (equation 66): scale each output's weights to magnitude 1, in place.

        A tensor that stands in for the parameter, as in torch.func.functional_call, is left unchanged.
        """
        # Weights that have not changed since the last call are not written to: a write would invalidate the autograd graphs of
        # earlier forward passes. Rows of magnitude 1 are multiplied by exactly 1, so that a resumed run makes the same weights.
        weight = self.weight
        if not isinstance(weight, nn.Parameter) or self._normalised_at == (id(weight), weight._version):
            return
        size = magnitude(weight, tuple(range(1, weight.ndim))).clamp(min=1e-30)
        weight.mul_(torch.where((size - 1).abs() > UNIT_TOLERANCE, 1 / size, 1.0).to(weight.dtype))
        self._normalised_at = (id(weight), weight._version)


# sqrt(2) cos(2 pi (f x + phi)), f ~ N(0, 1), phi ~ U(0, 1) (equation 75).
class MPFourier(nn.Module):
    """Cosines of the noise label at random frequencies and phases, with magnitude 1 (equation 75): [B] -> [B, channels]."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * torch.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(channels))

    def forward(self, noise_labels: Tensor) -> Tensor:
        """noise_labels: float32 [B]."""
        angles = torch.outer(noise_labels, self.freqs.to(noise_labels.dtype)) + self.phases.to(noise_labels.dtype)
        return angles.cos() * math.sqrt(2)


# sqrt(mean of x^2).
def magnitude(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Root mean square over dims, which are kept with size 1. At least float32: in 16 bits the sum of squares overflows."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm / math.sqrt(math.prod([x.shape[dim] for dim in dims]))


def normalised(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x scaled to magnitude 1 over dims."""
    return x / (magnitude(x, dims) + EPS).to(x.dtype)


# silu(x) / sqrt(E[silu(n)^2]), n ~ N(0, 1): the divisor is 0.596 (equation 81).
def mp_silu(x: Tensor) -> Tensor:
    """SiLU that preserves the magnitude of N(0, 1) inputs."""
    return F.silu(x) / 0.596


# ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2), t the balance (equation 88).
def mp_sum(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """Sum of a and b with weights 1 - balance and balance. If both are independent with magnitude 1, so has their sum."""
    return a.lerp(b, balance) / math.hypot(1 - balance, balance)


# sqrt((N_a + N_b) / ((1 - t)^2 + t^2)) [(1 - t) / sqrt(N_a) a, t / sqrt(N_b) b], N the channels (equation 103).
def mp_cat(a: Tensor, b: Tensor, balance: float) -> Tensor:
    """Concatenate the channels of a and b. They contribute to the next layer with weights 1 - balance and balance."""
    whole = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - balance, balance)
    first, second = (1 - balance) / math.sqrt(a.shape[1]), balance / math.sqrt(b.shape[1])
    return torch.cat([whole * first * a, whole * second * b], dim=1)


def resample(x: Tensor, resample_filter: tuple[float, ...], *, up: bool) -> Tensor:
    """Double the resolution with `up`, otherwise halve it, by a separable filter."""
    if resample_filter == (1, 1):  # repeating or averaging pixels is many times faster on CPUs than a depthwise convolution
        return F.interpolate(x, scale_factor=2.0) if up else F.avg_pool2d(x, 2)
    taps = x.new_tensor(resample_filter) / sum(resample_filter)
    depthwise = torch.outer(taps, taps).expand(x.shape[1], 1, -1, -1)
    padding = (len(resample_filter) - 1) // 2
    if up:
        return F.conv_transpose2d(x, depthwise * 4, stride=2, padding=padding, groups=x.shape[1])
    return F.conv2d(x, depthwise, stride=2, padding=padding, groups=x.shape[1])


def _check_filter(resample_filter: Sequence[float]) -> None:
    if not resample_filter or len(resample_filter) % 2:
        raise RequestError(
            f"resample_filter {list(resample_filter)} has {len(resample_filter)} taps", remedy="give an even number, as in 1,1"
        )
