"""The one-step module as engines are built from it: G(z) with everything folded that one constant noise level makes constant.

In one step sigma is sigma_init for every image. So the embedding is one vector, or one a class: what each block makes of it
becomes a constant of its layers, or a row of a table. Preconditioning and skip_scale go into neighbouring convolutions. The
result is the same function: equal within 1e-5 (tests/export/test_canonical.py).
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

# Up to here every class has its finished row for all blocks; beyond, that table would outweigh the network (1000 classes of
# ADM: 46 million numbers), so the embedding is looked up and multiplied.
MAX_TABLED_CLASSES = 100
# What folding multiplies whole weights by, and so what weights in half precision are found again by: skip_scale.
FACTORS = (1.0, math.sqrt(0.5))


class CanonicalOneStep(nn.Module):
    """z [B, *noise_shape], class_ids int64 [B] in range or None -> G(z), float32 [B, C, H, W] in about [-1, 1].

    Classes may be mixtures of two: as blocks map the embedding affinely, their rows are interpolated as embeddings are.
    dtype is what network and decoder compute in; `in_precision` changes it. The generator's layers become this module's, one
    block after the other, so that there is never a second copy of the weights: the generator is of no use afterwards.
    """

    dtype = torch.float32

    @one_torch_thread()
    @torch.no_grad()
    def __init__(self, generator: OneStep, norm: NormFactory = copy.deepcopy):
        super().__init__()
        denoiser, sigma_init, self.decoder = generator.denoiser, generator.sigma_init, generator.decoder
        self.patch = denoiser.patch
        c_skip, c_out, c_in, c_noise = (c.double() for c in denoiser.preconditioning(torch.full((1, 1, 1, 1), sigma_init)))
        emb = _embeddings(denoiser, c_noise.float().flatten())
        self.model: Network = denoiser.model
        self.rows = _fold_blocks(self.model, emb, denoiser.num_classes, norm)
        _fold_ends(self.model, float(c_in) * sigma_init, float(c_out), denoiser.image_shape[0] * self.patch**2)
        self.skip = float(c_skip) * sigma_init
        self.to(torch.float32).eval()

    def in_precision(self, dtype: torch.dtype) -> Self:
        """The same with network and decoder in that dtype. Noise, the skip connection and the images stay float32.

        At sigma = 80 a rounded skip connection would round away the image under the noise.
        """
        self.dtype = dtype
        for part in (self.model, self.rows, self.decoder):
            if part is not None:
                part.to(dtype)
        return self

    def forward(self, noise: Tensor, class_ids: ClassLabels | None = None) -> Tensor:
        """G(z) of float32 z."""
        rows = noise if self.rows is None else self.rows(class_ids)  # no block reads them where nothing depends on a class
        x = noise.to(self.dtype)
        x = x if self.patch == 1 else F.pixel_unshuffle(x, self.patch)
        out = self.model.decode(self.model.encode(x, rows), rows)
        out = out if self.patch == 1 else F.pixel_shuffle(out, self.patch)
        made = self.skip * noise + out.float()
        return made if self.decoder is None else self.decoder(made.to(self.dtype)).float()


class ClassRows(nn.Module):
    """class_ids [B] -> what all blocks read, side by side: [B, total]. From a table, or from the embedding by one product."""

    table: Tensor

    def __init__(self, emb: Tensor, weight: Tensor, bias: Tensor):
        super().__init__()
        tabled = len(emb) <= MAX_TABLED_CLASSES
        self.register_buffer("table", emb @ weight.T + bias if tabled else emb)
        self.linear = None if tabled else nn.Linear(weight.shape[1], weight.shape[0])
        if self.linear is not None:
            self.linear.weight, self.linear.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, class_ids: ClassLabels) -> Tensor:
        """[B, total]."""
        if isinstance(class_ids, MixedClasses):
            first, second = (F.embedding(ids, self.table) for ids in (class_ids.class_ids, class_ids.other_ids))
            rows = interpolated(first, second, class_ids.share)
        else:
            rows = F.embedding(class_ids, self.table)
        return rows if self.linear is None else self.linear(rows)


def _embeddings(denoiser: Denoiser, c_noise: Tensor) -> Tensor:
    """The embedding of each class, or the one that there is: float64 [classes or 1, emb_channels].

    Computed in 32 bits, as the network does: sines of angles in the hundreds differ from 64 bits in the fifth digit.
    """
    if not denoiser.num_classes:
        return denoiser.model.embed(c_noise, None).double()
    labels = torch.eye(denoiser.num_classes)
    return denoiser.model.embed(c_noise.expand(len(labels)), labels).double()


def _fold_blocks(model: Network, emb: Tensor, num_classes: int, norm: NormFactory) -> ClassRows | None:
    """Puts folded blocks in place of the model's; returns what they read of the class, None where there are no classes."""
    maps: list[tuple[Tensor, Tensor]] = []
    for half in (model.enc, model.dec):
        for name, block in half.items():
            if not isinstance(block, UNetBlock | Block):
                continue
            # In double precision one block at a time: all of them at once would be twice the network.
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
            delattr(model, name)  # the embedding network: its results are in the rows
    if not num_classes:
        return None
    weights, biases = zip(*maps, strict=True)
    return ClassRows(emb, torch.cat(weights), torch.cat(biases))


def _replace_norms(model: Network, norm: NormFactory) -> None:
    """Norms outside the blocks, in the form that the target wants."""
    for holder in (model, model.enc, model.dec):
        for name, module in list(holder.named_children()):
            if isinstance(module, GroupNorm):
                holder.register_module(name, norm(module))


def _fold_ends(model: Network, c_in: float, c_out: float, channels: int) -> None:
    """c_in into what reads the image, c_out into what writes it; of the channels written, only the first are read."""
    _FOLD_ENDS[type(model)](model, c_in, c_out, channels)


def _fold_song_ends(model: SongUNet, c_in: float, c_out: float, channels: int) -> None:
    first_residual = True
    for name, module in model.enc.items():
        residual = name.endswith("_aux_residual")
        if name.endswith(("_conv", "_aux_skip")) or (residual and first_residual):
            _scale_input(module, c_in)
        first_residual &= not residual  # later ones read a sum that is scaled already
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
