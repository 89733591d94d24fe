"""The decoder of the VAE AutoencoderKL, with diffusers' parameter names and numerics, so that its weights load unchanged."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.bundle import DECODER, Bundle
from uni_instruct.errors import BundleError, RequestError
from uni_instruct.networks.blocks import attention
from uni_instruct.spec import DecoderSpec

# Of all normalisations. AutoencoderKL has it hard-coded: its config.json does not set it.
_EPS = 1e-6


class LatentDecoder(nn.Module):
    """From the network's latents z to pictures: pixel_scale D(latent_scale z + latent_shift) + pixel_shift."""

    latent_scale: Tensor
    latent_shift: Tensor

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        self.spec = spec
        self.vae = AutoencoderDecoder(spec)
        # Not persistent, because they come from the spec: the weights file has the VAE's parameters only.
        for name in ("latent_scale", "latent_shift"):
            values = torch.tensor(getattr(spec, name), dtype=torch.float32, device="cpu").reshape(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def forward(self, latents: Tensor) -> Tensor:
        """float32 [B, C, H, W] -> [B, out_channels, f H, f W] in about [-1, 1]."""
        decoded = self.vae(latents * self.latent_scale + self.latent_shift)
        out: Tensor = decoded * self.spec.pixel_scale + self.spec.pixel_shift
        return out


class AutoencoderDecoder(nn.Module):
    """D: from the VAE's own latents to images. This is the half of AutoencoderKL that its `decode` runs."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        channels = spec.latent_channels
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if spec.use_post_quant_conv else None
        self.decoder = Decoder(spec)

    def forward(self, raw: Tensor) -> Tensor:
        """[B, latent_channels, H, W] -> [B, out_channels, f H, f W], f = 2^(levels - 1)."""
        out: Tensor = self.decoder(raw if self.post_quant_conv is None else self.post_quant_conv(raw))
        return out


class Decoder(nn.Module):
    """The levels from the coarsest to the finest, each with layers_per_block + 1 residual blocks."""

    def __init__(self, spec: DecoderSpec):
        super().__init__()
        coarse_first = spec.block_out_channels[::-1]
        groups, layers = spec.norm_num_groups, spec.layers_per_block + 1
        self.conv_in = nn.Conv2d(spec.latent_channels, coarse_first[0], 3, padding=1)
        self.mid_block = MidBlock(coarse_first[0], groups, attend=spec.mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        entering = coarse_first[0]
        for level, width in enumerate(coarse_first):
            last = level == len(coarse_first) - 1
            self.up_blocks.append(UpBlock(entering, width, groups, layers, upsample=not last))
            entering = width
        self.conv_norm_out = nn.GroupNorm(groups, entering, eps=_EPS)
        self.conv_out = nn.Conv2d(entering, spec.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, latent_channels, H, W] -> [B, out_channels, f H, f W]."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class MidBlock(nn.Module):
    """A residual block, optional attention, and another residual block."""

    def __init__(self, channels: int, groups: int, *, attend: bool):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attend else [])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same shape."""
        x = self.resnets[0](x)
        for layer in self.attentions:
            x = layer(x)
        out: Tensor = self.resnets[1](x)
        return out


class UpBlock(nn.Module):
    """The residual blocks of one level, then upsampling to twice the resolution, except at the finest level."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, layers: int, *, upsample: bool):
        super().__init__()
        widths = [in_channels, *[out_channels] * layers]
        self.resnets = nn.ModuleList([ResnetBlock(before, after, groups) for before, after in pairwise(widths)])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H', W'], H' = 2 H or H."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Upsample(nn.Module):
    """Repeat each pixel 2x2 times, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, channels, 2 H, 2 W]."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0))
        return out


class ResnetBlock(nn.Module):
    """x + f(x), where a 1x1 convolution is applied to the first x if the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H, W]."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class Attention(nn.Module):
    """x + self-attention over all pixels, with one head."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same shape."""
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]  # [B, 1, H W, channels]
        attended = attention(self.to_q(pixels), self.to_k(pixels), self.to_v(pixels))
        out: Tensor = x + self.to_out[0](attended)[:, 0].transpose(1, 2).reshape(x.shape)
        return out


def load_decoder(bundle: Bundle) -> LatentDecoder | None:
    """The bundle's decoder with its weights, in evaluation mode; None without one. Raises BundleError if they do not fit."""
    weights = bundle.decoder_weights()
    if bundle.spec.decoder is None or weights is None:
        return None
    decoder = build_decoder(bundle.spec.decoder)
    try:
        decoder.vae.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:300]
        raise BundleError(
            f"{DECODER} of {bundle.path} does not fit its decoder: {problem}", remedy="copy or download the whole folder again"
        ) from error
    return decoder.eval()


def build_decoder(spec: DecoderSpec) -> LatentDecoder:
    """The decoder with freshly initialised weights. Raises RequestError if the spec's values do not fit together."""
    try:
        return LatentDecoder(spec)
    except (ValueError, RuntimeError) as error:
        raise RequestError(f"the decoder cannot be built: {error}", remedy="give another VAE", param="decoder") from error


def decoder_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """The shapes of the decoder's parameters, by diffusers' names. No memory is allocated for the parameters."""
    with torch.device("meta"):
        decoder = build_decoder(spec)
    return {name: tuple(tensor.shape) for name, tensor in decoder.vae.state_dict().items()}
