"""A denoiser: a network with its preconditioning and class labels. Its encoder can run alone, for a discriminator."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.networks.network import Network
from uni_instruct.networks.preconditioning import EDM, Preconditioning
from uni_instruct.spec import ImageShape


class Encoded(NamedTuple):
    """An encoder's outputs [B, C_i, H_i, W_i], the last of which is the bottleneck's, and the embedding [B, E]."""

    features: list[Tensor]
    emb: Tensor


class MixedClasses(NamedTuple):
    """`ClassMixture` as tensors: class_ids and other_ids int64 [B], share float32 [B] in [0, 1]."""

    class_ids: Tensor
    other_ids: Tensor
    share: Tensor


# The class of each image: ids int64 [B], where a Denoiser reads -1 as no class; or mixtures of two classes.
ClassLabels = Tensor | MixedClasses


def interpolated(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """(1 - s) first + s second, for rows [B, E] and shares [B]. Exact at both ends, unlike first + s (second - first)."""
    s = share[:, None].to(first.dtype)
    return first * (1 - s) + second * s


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise): the expected clean image (arXiv 2206.00364, equation 7).

    patch: the network's input has patch x patch pixels as the channels of one: [B, C patch^2, H / patch, W / patch]. That only
    reorders values, so noise, preconditioning and all formulas are those of the full resolution.
    """

    def __init__(
        self,
        model: Network,
        image_shape: ImageShape,
        num_classes: int = 0,
        preconditioning: Preconditioning | None = None,
        *,
        patch: int = 1,
    ):
        super().__init__()
        self.model = model
        self.image_shape, self.num_classes, self.patch = image_shape, num_classes, patch
        self.preconditioning = preconditioning or EDM()

    def forward(
        self, x: Tensor, sigma: Tensor, class_ids: ClassLabels | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The expected clean image of x [B, C, H, W] at noise levels sigma [B, 1, 1, 1].

        class_ids: int64 [B], or mixtures of two classes. -1 is no class, None is no class for all images: the label is zero.
        """
        return self.decode(self.encode(x, sigma, class_ids, augment_labels), x, sigma)

    def encode(
        self, x: Tensor, sigma: Tensor, class_ids: ClassLabels | None = None, augment_labels: Tensor | None = None
    ) -> Encoded:
        """Run the first half of the network. Its bottleneck is the input of a discriminator."""
        c = self.preconditioning(sigma)
        emb = self._embed(c.c_noise.flatten(), class_ids, x, augment_labels)
        return Encoded(self.model.encode(self._unshuffled(c.c_in * x), emb), emb)

    def decode(self, encoded: Encoded, x: Tensor, sigma: Tensor) -> Tensor:
        """Run the second half of the network: the expected clean image [B, C, H, W]."""
        c = self.preconditioning(sigma)
        out = self._shuffled(self.model.decode(encoded.features, encoded.emb))
        if out.shape[1] != x.shape[1]:  # the other channels are iDDPM's predicted variance, which no sampler here uses
            out = out[:, : x.shape[1]]
        return c.c_skip * x + c.c_out * out

    # A patch of 1 returns early: torch would copy the images, and exporters would write a node.

    def _unshuffled(self, x: Tensor) -> Tensor:
        """The network's input from images [B, C, H, W]: [B, C patch^2, H / patch, W / patch]."""
        return x if self.patch == 1 else F.pixel_unshuffle(x, self.patch)

    def _shuffled(self, out: Tensor) -> Tensor:
        """The network's output at full resolution."""
        return out if self.patch == 1 else F.pixel_shuffle(out, self.patch)

    @torch.no_grad()
    def renumber_classes(self, ids: np.ndarray) -> None:
        """Permute the classes in place: class i becomes what was class ids[i].

        Every network reads its class labels with one linear layer, whose columns are the classes.
        """
        for name, weight in self.model.named_parameters():
            if name in ("map_label.weight", "emb_label.weight"):
                weight.copy_(weight[:, torch.from_numpy(ids)])

    @property
    def sigma_data(self) -> float:
        """The standard deviation of the data."""
        return self.preconditioning.sigma_data

    def _embed(self, c_noise: Tensor, class_ids: ClassLabels | None, x: Tensor, augment_labels: Tensor | None) -> Tensor:
        """The embedding [B, E]. For mixtures, both classes' embeddings are interpolated.

        The labels are not interpolated, because the layers from label to embedding are not linear. Blocks read the embedding
        linearly, so a mixture of embeddings is the same mixture for every block. The export, which replaces embeddings by a
        table of precomputed rows (export/canonical.py), can then mix rows with the same result.
        """
        if not isinstance(class_ids, MixedClasses):
            return self.model.embed(c_noise, self._class_labels(class_ids, x), augment_labels)
        # Not in one batch: matrix products of twice as many rows differ in the last bit.
        ids = (class_ids.class_ids, class_ids.other_ids)
        first, second = (self.model.embed(c_noise, self._class_labels(part, x), augment_labels) for part in ids)
        return interpolated(first, second, class_ids.share)

    def _class_labels(self, class_ids: Tensor | None, x: Tensor) -> Tensor | None:
        """One-hot float32 [B, num_classes], zeros for class -1 or None; None for an unconditional model."""
        if not self.num_classes:
            return None
        if class_ids is None:
            return x.new_zeros(len(x), self.num_classes)
        return (class_ids[:, None] == torch.arange(self.num_classes, device=class_ids.device)).float()
