"""What every U-Net here has in common: an embedding of noise level and class, an encoder and a decoder."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Network(nn.Module, ABC):
    """F(x; noise label, class, augmentation).

    A discriminator reads the embedding and the encoder's last output, which have emb_channels and bottleneck_channels. `enc`
    and `dec` hold the blocks of either half.
    """

    emb_channels: int
    bottleneck_channels: int
    enc: nn.ModuleDict
    dec: nn.ModuleDict

    def forward(
        self, x: Tensor, noise_labels: Tensor, class_labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """F(x): [B, C, H, W].

        x [B, C, H, W], noise_labels [B], class_labels one-hot [B, num_classes], augment_labels [B, augment_dim].
        """
        emb = self.embed(noise_labels, class_labels, augment_labels)
        return self.decode(self.encode(x, emb), emb)

    @abstractmethod
    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        """The embedding that every block reads: [B, emb_channels]. class_labels is None without classes."""

    @abstractmethod
    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """Every encoder output that the decoder reads, the bottleneck's last."""

    @abstractmethod
    def decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        """The encoder's outputs to F(x): [B, C, H, W]."""
