"""What several test modules share: small bundles with random weights, and the rule for Debian packages."""

import os
from pathlib import Path

import pytest

from uni_instruct.bundle import Bundle, GeneratorSpec

DIGITS = tuple(str(n) for n in range(10))


def require_debian(path: str, package: str) -> Path:
    """The file of a Debian package; where it is missing the test skips, in CI it fails."""
    if not Path(path).exists():
        message = f"needs the Debian package {package}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return Path(path)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A conditional one-step generator of 8x8 grey images, random weights. Read only: copy it before changing it."""
    return random_bundle(tmp_path_factory.mktemp("bundles") / "tiny", seed=1)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A many-step teacher of the same shape."""
    return random_bundle(tmp_path_factory.mktemp("bundles") / "teacher", seed=2, steps=4)


def random_bundle(path: Path, seed: int, steps: int = 1, num_classes: int = 10) -> Bundle:
    """A bundle whose images differ visibly between seeds and classes."""
    torch = pytest.importorskip("torch")
    from uni_instruct.networks.build import build_denoiser

    spec = GeneratorSpec(
        name="tiny",
        image_shape=(1, 8, 8),
        num_classes=num_classes,
        class_names=DIGITS[:num_classes],
        steps=steps,
        network_args={"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
    )
    generator = torch.Generator().manual_seed(seed)
    state = build_denoiser(spec).state_dict()
    weights = {
        name: (tensor + 0.1 * torch.randn(tensor.shape, generator=generator) * ("resample" not in name)).numpy()
        for name, tensor in state.items()
    }
    return Bundle.write(path, spec, weights, card="# tiny\n")
