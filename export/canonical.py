"""The module that engines are built from: G(z), with everything that is constant at one noise level folded into the weights.

A one-step generator uses sigma = sigma_init for every image. So the embedding is one vector, or one vector per class, and what
each block computes from it is a constant of its layers, or a row of a table. Preconditioning and skip_scale are folded into
neighbouring convolutions. The result is the same function, within 1e-5 (tests/export/test_canonical.py).
"""

import copy
import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.engines.hardware.threads import one_torch_thread
from uni_instruct.export import canonical_blocks, canonical_edm2
from uni_instruct.export.canonical_blocks import FoldedBlock, NormFactory
from uni_instruct.export.canonical_edm2 import FoldedEDM2Block
from uni_instruct.networks.adm import ADM
from uni_instruct.networks.blocks import Conv2d, UNetBlock
from uni_instruct.networks.ddpmpp import SongUNet
from uni_instruct.networks.denoiser import ClassLabels, Denoiser, MixedClasses, interpolated
from uni_instruct.networks.edm2 import EDM2, Block
from uni_instruct.networks.group_norm import GroupNorm
from uni_instruct.networks.network import Network
from uni_instruct.networks.one_step import OneStep

# With at most this many classes, a table holds the final row of each class for all blocks. With more, the table would be too
# large (46 million numbers for the 1000 classes of ADM), so the class's embedding is looked up and multiplied instead.
MAX_TABLED_CLASSES = 100
# Folding multiplies weights by skip_scale, which is one of these. `graph._as_half` divides by them, to recover the float16
# values of a bundle in half precision.
FACTORS = (1.0, math.sqrt(0.5))


class CanonicalOneStep(nn.Module):
    """G(z) with folded weights: z [B, *noise_shape] and class_ids int64 [B] or None -> float32 [B, C, H, W] in about [-1, 1].

    Classes may be mixtures of two: each block's map of the embedding is affine, so rows may be interpolated like embeddings.
    dtype: what network and decoder compute in; `in_precision` changes it. To avoid a second copy of the weights, the
    constructor takes over the generator's layers, block by block: the generator cannot be used afterwards.
    """

    dtype = torch.float32

    @one_torch_thread()
    @torch.no_grad()
    def __init__(self, generator: OneStep, norm: NormFactory = copy.deepcopy):
        super().__init__()
        denoiser, sigma_init, self.decoder = generator.denoiser, generator.sigma_init, generator.decoder
        self.patch = denoiser.patch
        c_skip, c_out, c_in, c_noise = (c.double() for c in denoiser.preconditioning(torch.full((1, 1, 1, 1), sigma_init)))
        # G(z) = D(sigma_init z; sigma_init) = c_skip sigma_init z + c_out F(c_in sigma_init z; c_noise, class)
        emb = _embeddings(denoiser, c_noise.float().flatten())
        self.model: Network = denoiser.model
        self.rows = _fold_blocks(self.model, emb, denoiser.num_classes, norm)
        _fold_ends(self.model, float(c_in) * sigma_init, float(c_out), denoiser.image_shape[0] * self.patch**2)
        self.skip = float(c_skip) * sigma_init
        self.to(torch.float32).eval()

    def in_precision(self, dtype: torch.dtype) -> Self:
        """Convert network and decoder to that dtype, in place; returns self. Noise, skip connection and images stay float32.

        With c_skip = 1 and sigma_init = 80, the skip connection carries noise 80 times as large as the image. Rounded to 16
        bits, it would lose the image.
        """
        self.dtype = dtype
        for part in (self.model, self.rows, self.decoder):
            if part is not None:
                part.to(dtype)
        return self

    def forward(self, noise: Tensor, class_ids: ClassLabels | None = None) -> Tensor:
        """G(z) of float32 z, as float32."""
        rows = noise if self.rows is None else self.rows(class_ids)  # without classes no block reads the rows
        x = noise.to(self.dtype)
        x = x if self.patch == 1 else F.pixel_unshuffle(x, self.patch)
        out = self.model.decode(self.model.encode(x, rows), rows)
        out = out if self.patch == 1 else F.pixel_shuffle(out, self.patch)
        made = self.skip * noise + out.float()
        return made if self.decoder is None else self.decoder(made.to(self.dtype)).float()


class ClassRows(nn.Module):
    """class_ids [B] -> rows [B, total]: the values that all blocks read, side by side.

    They come from a table of rows; with more than MAX_TABLED_CLASSES classes, from the embedding by one linear layer.
    """

    table: Tensor

    def __init__(self, emb: Tensor, weight: Tensor, bias: Tensor):
        super().__init__()
        tabled = len(emb) <= MAX_TABLED_CLASSES
        self.register_buffer("table", emb @ weight.T + bias if tabled else emb)
        self.linear = None if tabled else nn.Linear(weight.shape[1], weight.shape[0])
        if self.linear is not None:
            self.linear.weight, self.linear.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, class_ids: ClassLabels) -> Tensor:
        """The rows of the classes, [B, total]; of a mixture, interpolated between both classes."""
        if isinstance(class_ids, MixedClasses):
            first, second = (F.embedding(ids, self.table) for ids in (class_ids.class_ids, class_ids.other_ids))
            rows = interpolated(first, second, class_ids.share)
        else:
            rows = F.embedding(class_ids, self.table)
        return rows if self.linear is None else self.linear(rows)


def _embeddings(denoiser: Denoiser, c_noise: Tensor) -> Tensor:
    """The embedding of each class, or of no class: float64 [num_classes or 1, emb_channels].

    It is computed in float32, like the network's: for angles in the hundreds, float64 sines differ in the fifth digit.
    """
    if not denoiser.num_classes:
        return denoiser.model.embed(c_noise, None).double()
    labels = torch.eye(denoiser.num_classes)
    return denoiser.model.embed(c_noise.expand(len(labels)), labels).double()


def _fold_blocks(model: Network, emb: Tensor, num_classes: int, norm: NormFactory) -> ClassRows | None:
    """Replace the model's blocks by folded ones. Returns the module that makes their rows; None without classes."""
    maps: list[tuple[Tensor, Tensor]] = []
    for half in (model.enc, model.dec):
        for name, block in half.items():
            if not isinstance(block, UNetBlock | Block):
                continue
            # One block at a time is converted to float64: all at once would take twice the memory of the network.
            block.double()
            weight, bias = (canonical_blocks if isinstance(block, UNetBlock) else canonical_edm2).row_map(block)
            row = None if num_classes else weight @ emb[0] + bias
            folded = FoldedBlock(block, norm, row) if isinstance(block, UNetBlock) else FoldedEDM2Block(block, row)
            half[name] = folded.float()
            if num_classes:
                start = sum(len(other) for _, other in maps)
                folded.place = slice(start, start + len(bias))
                maps.append((weight, bias))
    _replace_norms(model, norm)
    for name, _ in list(model.named_children()):
        if name.startswith(("map_", "emb_")):
            delattr(model, name)  # the embedding network, whose results are folded
    if not num_classes:
        return None
    weights, biases = zip(*maps, strict=True)
    return ClassRows(emb, torch.cat(weights), torch.cat(biases))


def _replace_norms(model: Network, norm: NormFactory) -> None:
    """Convert the norms outside the blocks to the form that the runtime needs."""
    for holder in (model, model.enc, model.dec):
        for name, module in list(holder.named_children()):
            if isinstance(module, GroupNorm):
                holder.register_module(name, norm(module))


def _fold_ends(model: Network, c_in: float, c_out: float, channels: int) -> None:
    """Fold c_in into the layers that read the image, c_out into those that write it. Keep the first `channels` outputs only.

    iDDPM's networks also predict a variance, in further output channels, which is not used.
    """
    _FOLD_ENDS[type(model)](model, c_in, c_out, channels)


def _fold_song_ends(model: SongUNet, c_in: float, c_out: float, channels: int) -> None:
    # The first convolution reads the image, and with NCSN++'s encoders the skip inputs of every level or the first residual.
    first_residual = True
    for name, module in model.enc.items():
        residual = name.endswith("_aux_residual")
        if name.endswith(("_conv", "_aux_skip")) or (residual and first_residual):
            _scale_input(module, c_in)
        first_residual &= not residual  # later ones read a sum that is already scaled
    # Every level may make a part of the image; the parts are summed.
    for name, module in model.dec.items():
        if name.endswith("_aux_conv"):
            _scale_output(module, c_out, channels)


def _fold_adm_ends(model: ADM, c_in: float, c_out: float, channels: int) -> None:
    _scale_input(next(iter(model.enc.values())), c_in)
    _scale_output(model.out_conv, c_out, channels)


def _scale_input(conv: nn.Module, factor: float) -> None:
    assert isinstance(conv, Conv2d)
    assert conv.weight is not None
    conv.weight.mul_(factor)


def _scale_output(conv: nn.Module, factor: float, channels: int) -> None:
    assert isinstance(conv, Conv2d)
    assert conv.weight is not None
    assert conv.bias is not None
    conv.weight, conv.bias = (nn.Parameter(p[:channels] * factor) for p in (conv.weight, conv.bias))
    conv.out_channels = channels


_FOLD_ENDS: dict[type, Callable[..., None]] = {SongUNet: _fold_song_ends, ADM: _fold_adm_ends, EDM2: canonical_edm2.fold_ends}
