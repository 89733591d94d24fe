"""A denoiser: a network with its preconditioning, class labels, and the encoder's view that a discriminator takes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uni_instruct.networks.network import Network
from uni_instruct.networks.preconditioning import EDM, Preconditioning
from uni_instruct.spec import ImageShape


class Encoded(NamedTuple):
    """What an encoder hands on: each of its outputs [B, C_i, H_i, W_i], the bottleneck's last, and the embedding [B, E]."""

    features: list[Tensor]
    emb: Tensor


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise): the expected clean image (arXiv 2206.00364, equation 7).

    The network sees patch x patch pixels as the channels of one: [B, C patch^2, H / patch, W / patch]. That only reorders
    pixels, so noise, preconditioning and every formula are the same as at full resolution.
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
        self, x: Tensor, sigma: Tensor, class_ids: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """The expected clean image of x [B, C, H, W] at noise levels sigma [B, 1, 1, 1].

        class_ids: int64 [B]; -1, or None for all, is the zero label.
        """
        return self.decode(self.encode(x, sigma, class_ids, augment_labels), x, sigma)

    def encode(
        self, x: Tensor, sigma: Tensor, class_ids: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Encoded:
        """The first half of the network; its bottleneck is what a discriminator sees."""
        c = self.preconditioning(sigma)
        emb = self.model.embed(c.c_noise.flatten(), self._class_labels(class_ids, x), augment_labels)
        return Encoded(self.model.encode(self._unshuffled(c.c_in * x), emb), emb)

    def decode(self, encoded: Encoded, x: Tensor, sigma: Tensor) -> Tensor:
        """The second half: the expected clean image."""
        c = self.preconditioning(sigma)
        out = self._shuffled(self.model.decode(encoded.features, encoded.emb))
        if out.shape[1] != x.shape[1]:  # iDDPM's predicted variance follows, which no sampler here reads
            out = out[:, : x.shape[1]]
        return c.c_skip * x + c.c_out * out

    # A patch of 1 is left out: torch would copy the images, and exporters would write a node.

    def _unshuffled(self, x: Tensor) -> Tensor:
        """What the network sees of images [B, C, H, W]."""
        return x if self.patch == 1 else F.pixel_unshuffle(x, self.patch)

    def _shuffled(self, out: Tensor) -> Tensor:
        """The network's output at full resolution."""
        return out if self.patch == 1 else F.pixel_shuffle(out, self.patch)

    @property
    def sigma_data(self) -> float:
        """The deviation of the data."""
        return self.preconditioning.sigma_data

    def _class_labels(self, class_ids: Tensor | None, x: Tensor) -> Tensor | None:
        """One-hot float32 [B, num_classes], zeros where the class is -1 or not given; None without classes."""
        if not self.num_classes:
            return None
        if class_ids is None:
            return x.new_zeros(len(x), self.num_classes)
        return (class_ids[:, None] == torch.arange(self.num_classes, device=class_ids.device)).float()
