"""The interface of all U-Nets here: an embedding of noise level and class, an encoder and a decoder."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Network(nn.Module, ABC):
    """A U-Net F(x; noise label, class, augmentation).

    emb_channels: size of the embedding. bottleneck_channels: channels of the encoder's last output. A discriminator reads both
    tensors. enc, dec: the blocks of the encoder and the decoder, by name.
    """

    emb_channels: int
    bottleneck_channels: int
    enc: nn.ModuleDict
    dec: nn.ModuleDict

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """F(x): [B, C, H, W].

        x: [B, C, H, W]. noise_labels: [B]. class_labels: one-hot [B, num_classes]. augment_labels: [B, augment_dim].
        """
        emb = self.embed(noise_labels, class_labels, augment_labels)
        return self.decode(self.encode(x, emb), emb)

    @abstractmethod
    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        """The embedding that every block reads: [B, emb_channels]. class_labels is None for an unconditional model."""

    @abstractmethod
    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """All encoder outputs that the decoder reads; the last is the bottleneck's."""

    @abstractmethod
    def decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        """F(x) from the encoder's outputs: [B, C, H, W]."""
