"""ADM (Dhariwal and Nichol 2021, arXiv 2105.05233) as EDM implements it."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.networks.blocks import (
    BlockStyle,
    Conv2d,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    fan_in_,
    zero_,
)
from uni_instruct.networks.group_norm import GroupNorm
from uni_instruct.networks.network import Network
from uni_instruct.networks.unet import UNetLayout, levels, run_decoder_block, skip_channels
from uni_instruct.spec import ImageShape

EPS = 1e-5


class ADM(Network):
    """The U-Net F(x; noise label, class, augmentation). Level i: resolution >> i, model_channels * channel_mult[i] channels.

    The embedding scales and shifts normalised features (adaptive group normalisation). Attention has one head for every
    channels_per_head channels; levels with fewer channels have no attention. out_channels: by default the image's.
    """

    def __init__(
        self,
        image_shape: ImageShape,
        num_classes: int = 0,
        *,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        channels_per_head: int = 64,
        dropout: float = 0.1,
        out_channels: int | None = None,
    ):
        super().__init__()
        plan = levels(image_shape, model_channels, channel_mult, attn_resolutions)
        emb_channels = self.emb_channels = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False, cosines_first=True)
        self.map_augment = Linear(augment_dim, model_channels, bias=False, init=zero_) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels, init=fan_in_)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=fan_in_)
        self.map_label = Linear(num_classes, emb_channels, bias=False, init=_normal_) if num_classes else None

        block = partial(UNetBlock, emb_channels=emb_channels, style=_style(channels_per_head), dropout=dropout)
        layout = UNetLayout(levels=plan, num_blocks=num_blocks, block=block, full_decoder_attention=True)
        self.enc = layout.encoder(Conv2d(image_shape[0], plan[0].channels, 3, init=fan_in_))
        self.bottleneck_channels = skip_channels(self.enc)[-1]
        self.dec = layout.decoder(self.enc)
        self.out_norm = GroupNorm(plan[0].channels, EPS)
        # Zero weights, so that D(x) starts as c_skip x.
        self.out_conv = Conv2d(plan[0].channels, out_channels or image_shape[0], 3, init=zero_)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        """The embedding that every block reads: [B, emb_channels]."""
        # As in EDM, the augmentation is added before the layers of the noise label, the class after them.
        emb = self.map_noise(noise_labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None and class_labels is not None:
            emb = emb + self.map_label(class_labels)
        return F.silu(emb)

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """All encoder outputs; the last is the bottleneck's."""
        features = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            features.append(x)
        return features

    def decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        """F(x) from the encoder's outputs: [B, C, H, W]."""
        skips, x = list(features), features[-1]
        for block in self.dec.values():
            assert isinstance(block, UNetBlock)
            x = run_decoder_block(block, x, skips, emb)
        out: Tensor = self.out_conv(self.out_norm(x, silu=True))
        return out


def _style(channels_per_head: int) -> BlockStyle:
    return BlockStyle(
        adaptive_scale=True,
        channels_per_head=channels_per_head,
        skip_scale=1.0,
        eps=EPS,
        project_resampled=False,
        init=fan_in_,
        init_qkv=fan_in_,
        init_last=zero_,
    )


def _normal_(weight: Tensor, _: Tensor | None) -> None:
    """N(0, 1) weights, so that a class's embedding has unit variance for any number of classes."""
    nn.init.normal_(weight)
