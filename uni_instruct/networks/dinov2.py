"""DINOv2's vision transformer (Oquab et al. 2023, arXiv 2304.07193), with the parameter names of its published weights.

It covers the sizes small, base and large, but not giant, which uses SwiGLU. The network is built from a state dict alone, so
that no downloaded code is run.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD_DIM = 64
# The published code adds this to the number of patches when it resizes position embeddings; their weights depend on it.
_OFFSET = 0.1


class LayerScale(nn.Module):
    """Multiply by gamma, a learned factor for each channel."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> the same shape."""
        return x * self.gamma


class TokenAttention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, dim: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, tokens, dim] -> the same shape."""
        batch, tokens, dim = x.shape
        split = self.qkv(x).reshape(batch, tokens, 3, dim // HEAD_DIM, HEAD_DIM).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*split.unbind(0))
        mixed: Tensor = self.proj(attended.transpose(1, 2).reshape(batch, tokens, dim))
        return mixed


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> the same shape."""
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class TransformerBlock(nn.Module):
    """x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim, eps=1e-6), TokenAttention(dim), LayerScale(dim)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, hidden), LayerScale(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, tokens, dim] -> the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class PatchEmbed(nn.Module):
    """A linear projection of each patch of pixels to a token."""

    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, patches, dim]."""
        tokens: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return tokens


class DinoV2(nn.Module):
    """The vision transformer: images [B, 3, H, W], normalised with ImageNet's mean and deviation, to features [B, dim].

    The features are the class token after the last norm. positions: the number of position embeddings, the class token's
    included.
    """

    def __init__(self, dim: int, depth: int, hidden: int, patch: int, positions: int):
        super().__init__()
        self.dim, self.patch = dim, patch
        self.patch_embed = PatchEmbed(dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # used in training only, but the published files contain it
        self.blocks = nn.ModuleList(TransformerBlock(dim, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> "DinoV2":
        """Build the network from a state dict. Raises KeyError, RuntimeError or ValueError if that is not one of DINOv2."""
        depth = 1 + max(int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name)))
        patches = weights["patch_embed.proj.weight"]
        network = cls(
            dim=patches.shape[0],
            depth=depth,
            hidden=weights["blocks.0.mlp.fc1.weight"].shape[0],
            patch=patches.shape[-1],
            positions=weights["pos_embed"].shape[1],
        )
        network.load_state_dict(dict(weights))
        return network.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> features float32 [B, dim]. H and W are multiples of the patch's side."""
        rows, columns = images.shape[2] // self.patch, images.shape[3] // self.patch
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1)
        tokens = tokens + self._positions(rows, columns)
        for block in self.blocks:
            tokens = block(tokens)
        features: Tensor = self.norm(tokens)[:, 0]
        return features

    def _positions(self, rows: int, columns: int) -> Tensor:
        side = round((self.pos_embed.shape[1] - 1) ** 0.5)
        if rows == columns == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, side, side, self.dim).permute(0, 3, 1, 2)
        scale = (rows + _OFFSET) / side, (columns + _OFFSET) / side
        resized = functional.interpolate(grid, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)
