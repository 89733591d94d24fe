"""G(z), the one-step generator: one evaluation of a denoiser at one noise level, then a decoder if any; pixels to bytes."""

import torch
from torch import Tensor, nn

from uni_instruct.bundle import Bundle
from uni_instruct.class_mixture import ClassIds, ClassMixture
from uni_instruct.networks.autoencoder import LatentDecoder, load_decoder
from uni_instruct.networks.build import load_denoiser
from uni_instruct.networks.denoiser import ClassLabels, Denoiser, MixedClasses
from uni_instruct.noise import Inputs


class OneStep(nn.Module):
    """`one_step` and the decoder as a module: from N(0, 1) noise to images. Training, export and the torch engine share it."""

    def __init__(self, denoiser: Denoiser, sigma_init: float, decoder: LatentDecoder | None = None):
        super().__init__()
        self.denoiser, self.sigma_init, self.decoder = denoiser, sigma_init, decoder

    def forward(self, noise: Tensor, class_ids: ClassLabels | None = None) -> Tensor:
        """Images float32 [B, C, H, W] in about [-1, 1], or latents.

        noise: float32 [B, *noise_shape]. class_ids: int64 [B] or mixtures of two classes; None for an unconditional model.
        """
        return self.decode(one_step(self.denoiser, noise, class_ids, self.sigma_init))

    def decode(self, made: Tensor) -> Tensor:
        """Decode the network's output to pictures. Without a decoder it is returned as it is."""
        out: Tensor = made if self.decoder is None else self.decoder(made)
        return out


def load_one_step(bundle: Bundle) -> OneStep:
    """The bundle's generator with its weights, in evaluation mode. Raises BundleError if a weight is missing or unexpected."""
    return OneStep(load_denoiser(bundle), bundle.spec.sigma_init, load_decoder(bundle)).eval()


def one_step(denoiser: Denoiser, noise: Tensor, class_ids: ClassLabels | None, sigma_init: float) -> Tensor:
    """G(z) = D(sigma_init z; sigma_init): float32 [B, C, H, W] in about [-1, 1]."""
    # An exported graph has one constant sigma for the whole batch, so that all that depends on sigma alone can be folded.
    # Otherwise each image has its own row: matrix products of one row and of many rows differ in the last bit.
    levels = 1 if torch.compiler.is_exporting() else len(noise)
    sigma = noise.new_full((levels, 1, 1, 1), sigma_init)
    out: Tensor = denoiser(noise * sigma_init, sigma, class_ids)
    return out


def as_tensors(inputs: Inputs, device: torch.device | str) -> tuple[Tensor, ClassLabels | None]:
    """The inputs (noise, class_ids) as tensors on the device."""
    z, class_ids = inputs
    return torch.from_numpy(z).to(device), None if class_ids is None else class_tensors(class_ids, device)


def class_tensors(class_ids: ClassIds, device: torch.device | str = "cpu") -> ClassLabels:
    """Class ids or mixtures as tensors on the device."""
    if isinstance(class_ids, ClassMixture):
        return MixedClasses(**{name: torch.from_numpy(part).to(device) for name, part in class_ids.arrays().items()})
    return torch.from_numpy(class_ids).to(device)


def to_uint8(images: Tensor) -> Tensor:
    """Convert float [B, C, H, W] in [-1, 1] to uint8 [B, H, W, C]. Values are truncated, not rounded, as in EDM."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
