"""DDPM++ and NCSN++ (Song et al. 2021, arXiv 2011.13456) as EDM implements them."""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.errors import RequestError
from uni_instruct.networks.blocks import (
    BlockStyle,
    Conv2d,
    FourierEmbedding,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    xavier_,
)
from uni_instruct.networks.group_norm import GroupNorm
from uni_instruct.networks.network import Network
from uni_instruct.networks.unet import Level, UNetLayout, levels, no_extra_modules, run_decoder_block, skip_channels
from uni_instruct.spec import ImageShape

STYLE = BlockStyle(
    adaptive_scale=False,
    channels_per_head=None,
    skip_scale=math.sqrt(0.5),  # keeps the variance: the sum of two independent branches has twice theirs
    eps=1e-6,
    project_resampled=True,
    init=xavier_,
    init_qkv=partial(xavier_, gain=math.sqrt(0.2)),
    init_last=partial(xavier_, gain=1e-5),
)


class SongUNet(Network):
    """The U-Net F(x; noise label, class, augmentation). Level i: resolution >> i, model_channels * channel_mult[i] channels.

    The defaults are DDPM++; `NCSNPP` holds those of NCSN++.

    encoder_type: 'skip' adds the downsampled image to the input of every level; 'residual' adds a path of strided convolutions
    parallel to the encoder. decoder_type: 'skip' sums an image from every level. resample_filter: an even number of taps.
    out_channels: by default the image's.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int = 0,
        *,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        channel_mult_emb: int = 4,
        channel_mult_noise: int = 1,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.1,
        embedding_type: str = "positional",
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[float] = (1, 1),
        out_channels: int | None = None,
    ):
        super().__init__()
        _check_choice("embedding_type", embedding_type, EMBEDDINGS)
        _check_choice("encoder_type", encoder_type, ENCODERS)
        _check_choice("decoder_type", decoder_type, DECODERS)
        _check_filter(resample_filter)
        self.emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        block = partial(UNetBlock, emb_channels=self.emb_channels, style=STYLE, dropout=dropout)
        block = partial(block, resample_filter=resample_filter)
        plan = levels(image_shape, model_channels, channel_mult, attn_resolutions)
        layout = UNetLayout(levels=plan, num_blocks=num_blocks, block=block, full_decoder_attention=False)
        self.map_noise = EMBEDDINGS[embedding_type](noise_channels)
        self.map_label = Linear(num_classes, noise_channels) if num_classes else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, self.emb_channels)
        self.map_layer1 = Linear(self.emb_channels, self.emb_channels)

        resample, image_channels = partial(Conv2d, resample_filter=resample_filter), image_shape[0]
        extra_modules = partial(ENCODERS[encoder_type], resample, image_channels)
        self.enc = layout.encoder(Conv2d(image_channels, model_channels, 3), extra_modules)
        self.bottleneck_channels = skip_channels(self.enc)[-1]
        output = partial(DECODERS[decoder_type], resample, out_channels or image_channels, plan)
        self.dec = layout.decoder(self.enc, output)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        """The embedding that every block reads: [B, emb_channels]."""
        emb = self.map_noise(noise_labels)
        if self.map_label is not None and class_labels is not None:
            # Times sqrt(K), a one-hot vector of K classes has a mean square of 1, as the layer's initial weights expect.
            emb = emb + self.map_label(class_labels * math.sqrt(self.map_label.in_features))
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """All encoder outputs that the decoder reads; the last is the bottleneck's."""
        features: list[Tensor] = []
        aux = x
        for name, block in self.enc.items():
            if isinstance(block, UNetBlock):
                features.append(block(features[-1], emb))
            elif name.endswith("_conv"):
                features.append(block(x))
            else:
                features[-1], aux = _AUX_STEPS[name.partition("_aux_")[2]](block, features[-1], aux)
        return features

    def decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        """F(x) from the encoder's outputs: [B, C, H, W]."""
        skips, x = list(features), features[-1]
        image = normed = None
        for name, block in self.dec.items():
            if isinstance(block, UNetBlock):
                x = run_decoder_block(block, x, skips, emb)
            elif isinstance(block, GroupNorm):
                normed = block(x, silu=True)
            elif name.endswith("_aux_conv"):
                image = block(normed) if image is None else image + block(normed)
            else:
                image = block(image)
        assert image is not None
        return image


NCSNPP = partial(
    SongUNet, embedding_type="fourier", encoder_type="residual", resample_filter=(1, 3, 3, 1), channel_mult_noise=2
)

_Resample = Callable[..., Conv2d]
_Modules = dict[str, nn.Module]


def _skip_path(resample: _Resample, image_channels: int, name: str, _: int, channels: int) -> _Modules:
    return {
        f"{name}_aux_down": resample(image_channels, image_channels, 0, down=True),
        f"{name}_aux_skip": Conv2d(image_channels, channels, 1),
    }


def _residual_path(resample: _Resample, _: int, name: str, above: int, channels: int) -> _Modules:
    return {f"{name}_aux_residual": resample(above, channels, 3, down=True, convolve_first=True)}


def _output(_: _Resample, out_channels: int, plan: list[Level], level: Level, channels: int) -> _Modules:
    if level is not plan[0]:  # only the finest level makes the image
        return {}
    return {
        f"{level.name}_aux_norm": GroupNorm(channels, STYLE.eps),
        f"{level.name}_aux_conv": Conv2d(channels, out_channels, 3, init=STYLE.init_last),
    }


def _outputs(resample: _Resample, out_channels: int, plan: list[Level], level: Level, channels: int) -> _Modules:
    enlarged = {} if level is plan[-1] else {f"{level.name}_aux_up": resample(out_channels, out_channels, 0, up=True)}
    return enlarged | _output(resample, out_channels, [level], level, channels)


EMBEDDINGS: dict[str, Callable[[int], nn.Module]] = {"positional": PositionalEmbedding, "fourier": FourierEmbedding}
# Functions that make a level's additional modules, for the encoder and for the decoder.
ENCODERS: dict[str, Callable[..., _Modules]] = {"standard": no_extra_modules, "skip": _skip_path, "residual": _residual_path}
DECODERS: dict[str, Callable[..., _Modules]] = {"standard": _output, "skip": _outputs}


def _join_residual(block: nn.Module, x: Tensor, aux: Tensor) -> tuple[Tensor, Tensor]:
    total = (x + block(aux)) * STYLE.skip_scale
    return total, total


# Kind of additional encoder layer -> the new values of the encoder's last feature x and of the parallel path aux.
_AUX_STEPS: dict[str, Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "down": lambda block, x, aux: (x, block(aux)),
    "skip": lambda block, x, aux: (x + block(aux), aux),
    "residual": _join_residual,
}


def _check_choice(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise RequestError(f"{name} '{value}' is unknown", remedy=f"choose one of {', '.join(known)}", param="network")


def _check_filter(taps: Sequence[float]) -> None:
    if len(taps) % 2 or not sum(taps):
        raise RequestError(
            f"resample_filter {list(taps)} cannot double or halve a resolution",
            remedy="give an even number of taps whose sum is not 0, such as [1, 1] or [1, 3, 3, 1]",
            param="network",
        )
