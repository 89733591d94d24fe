"""Bundles with random weights."""

from pathlib import Path

import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.engines.record import EngineId
from uni_instruct.spec import ImageShape, ModelSpec

ONNX = EngineId("onnx", "fp32")


DIGITS = tuple(str(n) for n in range(10))


def random_bundle(
    path: Path,
    seed: int,
    steps: int = 1,
    num_classes: int = 10,
    image_shape: ImageShape = (1, 8, 8),
    patch: int = 1,
    latents: bool = False,
) -> Bundle:
    """A bundle whose images differ visibly between seeds and classes; latents: they are a VAE's latents."""
    torch = pytest.importorskip("torch")
    from uni_instruct.networks.build import build_denoiser

    around = {"patch": patch} if patch > 1 else {}
    spec = ModelSpec(
        name="tiny",
        noise_shape=image_shape,
        latents=latents,
        num_classes=num_classes,
        class_names=DIGITS[:num_classes] if num_classes <= len(DIGITS) else (),
        steps=steps,
        network_args={"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], **around},
    )
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build_denoiser(spec).state_dict()
    weights = {
        name: (tensor + 0.1 * torch.randn(tensor.shape, generator=rng) * ("resample" not in name)).numpy()
        for name, tensor in state.items()
    }
    return Bundle.write(path, spec, weights, card="# tiny\n")
