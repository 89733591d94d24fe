"""`network.patch`: a network that sees squares of pixels as one, wherever a network is used.

Two truths hold it: the formula, with the permutation of pixels written in NumPy, and the twin, a network with the same weights
and without a patch, of images whose squares of pixels are channels.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jvp, vjp

from builders.patches import SHAPE, SIGMA, filled, permuted, shuffle, spec_of, twin_of, unshuffle, views
from uni_instruct.networks.build import NETWORKS, PATCHES
from uni_instruct.networks.critic import Critic
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.network import Network
from uni_instruct.networks.one_step import one_step
from uni_instruct.networks.preconditioning import IDDPM
from uni_instruct.sampler import heun_sample
from uni_instruct.train.config import LoopConfig
from uni_instruct.train.optimization.distributed import compiled_as_asked


@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("architecture", NETWORKS)
def test_denoiser_is_preconditioning_around_a_network_of_squares(architecture: str, patch: int, classes: int) -> None:
    denoiser = filled(spec_of(architecture, patch, classes))
    x, sigma, class_ids = views()
    total = sigma.numpy() ** 2 + 0.25
    one_hot = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]) if classes else None
    with torch.no_grad():
        found = denoiser(x, sigma, class_ids if classes else None)
        seen = torch.from_numpy(unshuffle(x.numpy() / np.sqrt(total), patch))
        out = denoiser.model(seen, (sigma.log() / 4).flatten(), one_hot).numpy()
    network = sigma.numpy() * 0.5 / np.sqrt(total) * shuffle(out, patch)
    assert (found.shape, found.dtype) == (x.shape, torch.float32)
    np.testing.assert_allclose(found.numpy(), 0.25 / total * x.numpy() + network, rtol=1e-5, atol=1e-5)
    assert np.abs(network).reshape(3, -1).max(axis=1).min() > 1e-2
    first = next(iter(denoiser.model.enc.items()))
    assert first[0] == f"{24 // patch}x{16 // patch}_conv"
    assert first[1].weight.shape[1] == 3 * patch**2 + (architecture == "edm2")  # EDM2 adds a channel of ones


class Through(Network):
    """Hands on what it sees, followed by more channels of the same number where out_factor is 2."""

    emb_channels = bottleneck_channels = 1

    def __init__(self, out_factor: int = 1):
        super().__init__()
        self.out_factor, self.seen = out_factor, torch.empty(0)

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        return noise_labels[:, None]

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        self.seen = x
        return [x]

    def decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        return torch.cat([features[-1], *[torch.full_like(features[-1], 7)] * (self.out_factor - 1)], dim=1)


def test_a_squares_pixels_are_channels_row_by_row() -> None:
    through, x = Through(), torch.arange(32.0).reshape(1, 2, 4, 4)
    denoiser = Denoiser(through, (2, 4, 4), patch=2)
    denoiser(x, torch.full((1, 1, 1, 1), 0.5))
    seen = (through.seen * 0.5**0.5).round()  # c_in is 1 / sqrt(0.5)
    assert seen[0, :, 0, 0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    assert seen[0, 0].tolist() == [[0, 2], [8, 10]]


@pytest.mark.parametrize("patch", PATCHES)
def test_a_predicted_variance_is_left_out_at_full_resolution(patch: int) -> None:
    """The noise, which is the network's first half, times -sigma beside the image."""
    denoiser = Denoiser(Through(out_factor=2), SHAPE, preconditioning=IDDPM(), patch=patch)
    x, sigma, _ = views()
    torch.testing.assert_close(denoiser(x, sigma), x - sigma * x / (sigma**2 + 1).sqrt())


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_a_predicted_variance_doubles_the_networks_channels(architecture: str) -> None:
    spec = spec_of(architecture, preconditioning="iddpm")
    denoiser, (x, sigma, class_ids) = filled(spec), views()
    last = [module for name, module in denoiser.model.named_modules() if name.endswith(("aux_conv", "out_conv"))]
    assert last[-1].weight.shape[0] == 2 * 3 * 4
    with torch.no_grad():
        found, expected = denoiser(x, sigma, class_ids), twin_of(denoiser, spec)(permuted(x, 2), sigma, class_ids)
    np.testing.assert_allclose(unshuffle(found.numpy(), 2), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch", PATCHES)
def test_an_image_without_noise_is_its_own_denoised_image(patch: int) -> None:
    """D(x; sigma) - x vanishes as sigma does, as c_out is about sigma and 1 - c_skip about 4 sigma^2."""
    denoiser = filled(spec_of(patch=patch))
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(3)) * 2 - 1
    levels = (1e-1, 1e-2, 1e-3, 1e-4)
    with torch.no_grad():
        errors = [(denoiser(x, torch.full((3, 1, 1, 1), level), None) - x).norm().item() for level in levels]
    orders = -np.diff(np.log10(errors))
    assert orders.min() > 0.7, errors
    assert errors[-1] < 1e-3 * x.norm()


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("architecture", NETWORKS)
def test_derivatives_go_through_the_squares(architecture: str, patch: int) -> None:
    """Forwards and backwards agree with each other, <u, J v> = <J^T u, v>, and with the difference quotient."""
    denoiser, sigma = filled(spec_of(architecture, patch, 0)).double(), SIGMA.double()
    rng = torch.Generator().manual_seed(2)
    x, along, against = (torch.randn(3, *SHAPE, generator=rng, dtype=torch.float64) for _ in range(3))

    def denoise(images: Tensor) -> Tensor:
        return denoiser(images, sigma)

    forward, backward = jvp(denoise, x, along)[1], vjp(denoise, x, against)[1]
    step = 1e-5
    with torch.no_grad():
        quotient = (denoise(x + step * along) - denoise(x - step * along)) / (2 * step)
    assert (against * forward).sum().item() == pytest.approx((backward * along).sum().item(), rel=1e-8)
    torch.testing.assert_close(forward, quotient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patch", [2, 4])
@pytest.mark.parametrize("architecture", NETWORKS)
def test_samples_are_those_of_the_twin(architecture: str, patch: int) -> None:
    spec = spec_of(architecture, patch)
    denoiser = filled(spec)
    twin, noise, class_ids = twin_of(denoiser, spec), views(4)[0] / SIGMA, torch.tensor([0, 2, 3])
    for sample in (lambda net, z: heun_sample(net, z, class_ids, 4), lambda net, z: one_step(net, z, class_ids, 2.5)):
        with torch.no_grad():
            found, expected = sample(denoiser, noise), sample(twin, permuted(noise, patch))
        assert found.shape == noise.shape
        np.testing.assert_allclose(unshuffle(found.numpy(), patch), expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("discriminator", ["shared", "own"])
@pytest.mark.parametrize("architecture", NETWORKS)
def test_critic_is_that_of_the_twin(architecture: str, discriminator: str) -> None:
    spec = spec_of(architecture)
    denoiser, inputs = filled(spec), views()
    critic, other = Critic(denoiser, discriminator), Critic(twin_of(denoiser, spec), discriminator)
    torch.nn.init.normal_(critic.head.logit.weight)
    other.load_state_dict(critic.state_dict())
    x = inputs[0].requires_grad_()
    denoised, logits = critic(*inputs)
    expected = other(permuted(x.detach(), 2), *inputs[1:])
    np.testing.assert_allclose(
        unshuffle(denoised.detach().numpy(), 2), expected.denoised.detach().numpy(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(logits, expected.logits)
    (gradient,) = torch.autograd.grad(logits.sum(), x, retain_graph=True)
    assert gradient.abs().amax(dim=(1, 2, 3)).min() > 0
    logits.sum().backward()
    encoder = denoiser if critic.own_encoder is None else critic.own_encoder
    assert all(parameter.grad is not None for parameter in encoder.model.enc.parameters())


def test_memory_format_changes_no_value() -> None:
    inputs = views()
    with torch.no_grad():
        expected = filled(spec_of())(*inputs)
        found = compiled_as_asked(filled(spec_of()), LoopConfig(channels_last=True))(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
