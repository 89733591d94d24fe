"""Peers' networks: as a module of theirs and, with the same weights, of ours."""

import torch
from torch import nn

from builders import checkpoints as made
from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.spec import ModelSpec

SIZE = {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}


NCSN = {"embedding_type": "fourier", "encoder_type": "residual", "resample_filter": [1, 3, 3, 1], "channel_mult_noise": 2}


# The peer's class, the class inside, classes, ours, and the arguments of the network inside.
PEERS = {
    "DDPM++": ("EDMPrecond", "SongUNet", 0, "ddpmpp", SIZE | {"augment_dim": 9, "dropout": 0.13}),
    "DDPM++ of SiDA": ("EDMPrecond_EncoderDecoder", "SongUNet_EncoderDecoder", 10, "ddpmpp", SIZE),
    "skip to skip": ("EDMPrecond", "SongUNet", 0, "ddpmpp", SIZE | {"encoder_type": "skip", "decoder_type": "skip"}),
    "NCSN++, VE": ("VEPrecond", "SongUNet", 0, "ddpmpp", SIZE | NCSN),
    "DDPM++, VP": ("VPPrecond", "SongUNet", 10, "ddpmpp", SIZE),
    "ADM": ("EDMPrecond", "DhariwalUNet", 10, "adm", SIZE),
    "ADM, iDDPM": ("iDDPMPrecond", "DhariwalUNet", 10, "adm", SIZE),
    "EDM2": ("Precond", "UNet", 10, "edm2", SIZE | {"model_channels": 64}),
}


PRECONDITIONINGS = {"VEPrecond": "ve", "VPPrecond": "vp", "iDDPMPrecond": "iddpm"}


def peer(name: str, channels: int = 3) -> tuple[nn.Module, Denoiser]:
    """The network as a peer's module, and the same weights in ours."""
    outer_class, inner_class, classes, ours, args = PEERS[name]
    more = {"preconditioning": PRECONDITIONINGS.get(outer_class, "edm")}
    torch.manual_seed(0)
    denoiser = build_denoiser(
        ModelSpec(name="peer", noise_shape=(channels, 8, 8), num_classes=classes, network=ours, network_args={**args, **more})
    )
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    shape = {"img_resolution": 8, "img_channels": channels, "label_dim": classes}
    outer = made.as_peer(nn.Module(), outer_class, {**shape, **args, "model_type": inner_class}, **shape, use_fp16=True)
    setattr(outer, "unet" if inner_class == "UNet" else "model", made.as_peer(denoiser.model, inner_class, dict(args)))
    if inner_class == "UNet":
        outer.logvar_linear = made.as_peer(nn.Linear(4, 1, bias=False), "MPConv")
    if outer_class == "iDDPMPrecond":
        outer.register_buffer("u", denoiser.preconditioning.table)  # type: ignore[attr-defined]
    return outer.eval(), denoiser.eval()
