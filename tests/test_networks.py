"""DDPM++ has EDM's parameter names and numerics, and the sampler is EDM's.

The recorded numbers were made by EDM's own EDMPrecond (github.com/NVlabs/edm, commit 008a4e5, SongUNet, torch 2.13 on a CPU)
from weights and inputs that are sine waves, as `fill` and `wave` write them below.
"""

import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from uni_instruct.bundle import GeneratorSpec
from uni_instruct.errors import RequestError
from uni_instruct.networks.blocks import Conv2d, attention
from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.critic import Critic
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.group_norm import ChannelsLastGroupNorm, GroupNorm
from uni_instruct.sampler import heun_sample
from uni_instruct.schedule import KarrasLevels, LogNormalLevels, NoiseLevels, sampling_sigmas

# Classes, augmentation labels, resolution, multipliers, attention -> hash of names and shapes; of each image the norm,
# element 11 and element -5.
CONDITIONAL = (10, 9, 16, (1, 2, 2), (8,))
UNCONDITIONAL = (0, 0, 8, (1, 2), ())
RECORDED = {
    CONDITIONAL: (
        "32b367428efcdef87fbeba9b9c66fc198908e517095bdf1475ab79dbc0dc361a",
        [39.98525619506836, 51.34379196166992, 49.594242095947266],
        [-2.267763137817383, -2.3431460857391357, 3.377225160598755],
        [0.18686853349208832, 0.20851123332977295, -2.080801486968994],
    ),
    UNCONDITIONAL: (
        "5957e1f709cc7044b8898fb59f312aab8bb8cf3b7659b3005b6a90a1247cca03",
        [19.610736846923828, 22.449642181396484, 25.774972915649414],
        [-1.826826810836792, -0.7442139387130737, -0.8070619702339172],
        [1.1314308643341064, 3.448345184326172, 3.6543357372283936],
    ),
}


@pytest.mark.parametrize("variant", RECORDED, ids=["conditional", "unconditional"])
def test_names_and_numerics_are_those_of_edm(variant: tuple) -> None:
    classes, augment_dim, resolution, channel_mult, attention = variant
    names_sha256, norms, element_11, element_minus_5 = RECORDED[variant]
    denoiser = network(classes, augment_dim, resolution, channel_mult, attention)
    names = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(denoiser.state_dict().items()))
    assert hashlib.sha256(names.encode()).hexdigest() == names_sha256

    fill(denoiser)
    x, sigma = wave((3, 3, resolution, resolution), 0.5, 2.0), torch.tensor([0.05, 0.9, 20.0]).reshape(3, 1, 1, 1)
    class_ids = torch.tensor([1, 7, 4]) if classes else None
    with torch.no_grad():
        out = denoiser(x, sigma, class_ids, wave((3, augment_dim), 1.5, 1.0) if augment_dim else None).flatten(1)
    assert out.norm(dim=1).tolist() == pytest.approx(norms, rel=1e-5)
    assert out[:, 11].tolist() == pytest.approx(element_11, rel=1e-4, abs=1e-4)
    assert out[:, -5].tolist() == pytest.approx(element_minus_5, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_of_bfloat16_channels_last_has_torchs_values_and_gradients(silu: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    images, towards = (torch.randn(3, 12, 5, 4, generator=generator).bfloat16() for _ in range(2))
    norm = GroupNorm(12)
    norm.load_state_dict({"weight": torch.linspace(0.5, 2, 12), "bias": torch.linspace(-1, 1, 12)})
    x = (3 * images + 2).to(memory_format=torch.channels_last).requires_grad_()
    wide = x.detach().float().contiguous().requires_grad_()
    out, expected = norm(x, silu), norm(wide, silu)
    assert ChannelsLastGroupNorm.__name__ in out.grad_fn.name()
    assert out.is_contiguous(memory_format=torch.channels_last)
    ours = (out, *torch.autograd.grad(out, (x, norm.weight, norm.bias), towards))
    truth = (expected, *torch.autograd.grad(expected, (wide, norm.weight, norm.bias), towards.float()))
    for value, true in zip(ours, truth, strict=True):
        assert (value.float() - true).norm() < 0.006 * true.norm()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_default_filter_resamples_as_its_convolution_does(direction: str) -> None:
    conv = Conv2d(3, 3, 0, **{direction: True})
    x, taps = torch.randn(2, 3, 4, 6), conv.resample_filter.expand(3, 1, 2, 2)
    convolve = torch.nn.functional.conv_transpose2d if direction == "up" else torch.nn.functional.conv2d
    expected = convolve(x, taps * 4 if direction == "up" else taps, stride=2, groups=3)
    torch.testing.assert_close(conv(x), expected)


def test_attention_in_bfloat16_is_that_of_torch() -> None:
    q, k, v = torch.randn(3, 2, 9, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v), expected)
    attended = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert attended.dtype == torch.bfloat16
    torch.testing.assert_close(attended.float(), expected, atol=0.03, rtol=0.03)


def test_any_resolution_that_the_levels_divide() -> None:
    denoiser = network(0, 0, (12, 8), (1, 2, 2), ())
    x = torch.zeros(2, 3, 12, 8)
    assert denoiser(x, torch.ones(2, 1, 1, 1)).shape == x.shape
    with pytest.raises(RequestError, match="resolution 10x8 is not divisible by 4; use fewer than 3 levels"):
        network(0, 0, (10, 8), (1, 2, 2), ())


@pytest.mark.parametrize("discriminator", ["shared", "own"])
def test_critic_denoises_as_its_fake_score_and_starts_at_ratio_one(discriminator: str) -> None:
    denoiser = network(*CONDITIONAL).eval()
    critic = Critic(denoiser, discriminator)
    x, sigma, class_ids = torch.randn(4, 3, 16, 16), torch.rand(4, 1, 1, 1) + 0.1, torch.arange(4)
    denoised, logits = critic(x, sigma, class_ids)
    torch.testing.assert_close(denoised, denoiser(x, sigma, class_ids))
    assert logits.tolist() == [0, 0, 0, 0]
    torch.nn.init.normal_(critic.head.logit.weight)
    both = critic(x, sigma, class_ids).logits
    torch.testing.assert_close(critic(x, sigma, class_ids, denoise=False).logits, both)
    assert both.abs().min() > 0
    both.sum().backward()
    reached = denoiser.model.enc["16x16_conv"].weight.grad
    assert (reached is None) == (discriminator == "own")


def test_hidden_class_is_the_zero_label() -> None:
    torch.manual_seed(0)
    denoiser = network(*CONDITIONAL).eval()
    torch.nn.init.normal_(denoiser.model.map_label.weight)
    x, sigma = torch.randn(2, 3, 16, 16), torch.rand(2, 1, 1, 1) + 0.1
    hidden, none = denoiser(x, sigma, torch.tensor([-1, -1])), denoiser(x, sigma, None)
    torch.testing.assert_close(hidden, none)
    assert not torch.equal(denoiser(x, sigma, torch.tensor([0, 1])), none)


class GaussianDenoiser(Denoiser):
    """The exact denoiser of N(mean, std^2 I)."""

    def __init__(self, mean: float, std: float):
        torch.nn.Module.__init__(self)
        self.mean, self.std = mean, std

    def forward(self, x: Tensor, sigma: Tensor, *labels: Tensor | None) -> Tensor:
        variance = self.std**2
        return (variance * x + sigma**2 * self.mean) / (variance + sigma**2)


def test_heun_sampler_solves_the_probability_flow_to_second_order() -> None:
    """On a Gaussian the flow is affine: x(0) = mean + std (x(S) - mean) / sqrt(std^2 + S^2), S the largest noise level."""
    mean, std, largest = 0.3, 0.4, 80.0
    z = torch.linspace(-2, 2, 9).reshape(9, 1, 1, 1)
    truth = mean + std * (z * largest - mean) / math.sqrt(std**2 + largest**2)
    steps = np.array([8, 16, 32, 64])
    errors = [(heun_sample(GaussianDenoiser(mean, std), z, None, n) - truth).abs().max().item() for n in steps]
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 1.7 < order < 3.5, (order, errors)
    assert errors[-1] < 5e-3


def test_sampling_sigmas_fall_from_80_to_0002_to_0() -> None:
    sigmas = sampling_sigmas(18)
    assert (sigmas[0], sigmas[-2], sigmas[-1]) == (pytest.approx(80), pytest.approx(0.002), 0)
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("levels", [KarrasLevels(100, 800), LogNormalLevels(-1.2, 1.2)], ids=["karras", "lognormal"])
def test_density_of_noise_levels_is_that_of_their_sampler(levels: NoiseLevels) -> None:
    sigma = levels.draw(200_000, torch.Generator().manual_seed(0)).flatten().double()
    edges = torch.quantile(sigma[:100_000], torch.linspace(0.05, 0.95, 19, dtype=torch.float64))
    for low, high in itertools.pairwise(edges):
        grid = torch.linspace(low.item(), high.item(), 201, dtype=torch.float64)
        expected = torch.trapezoid(levels.density(grid), grid).item()
        share = ((sigma >= low) & (sigma < high)).double().mean().item()
        assert share == pytest.approx(expected, abs=0.004)


def network(classes: int, augment_dim: int, resolution: object, channel_mult: tuple, attention: tuple) -> Denoiser:
    height, width = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    args = {
        "model_channels": 16,
        "channel_mult": channel_mult,
        "num_blocks": 2,
        "attn_resolutions": attention,
        "augment_dim": augment_dim,
    }
    spec = GeneratorSpec(name="test", image_shape=(3, height, width), num_classes=classes, network_args=args)
    return build_denoiser(spec).eval()


def fill(module: torch.nn.Module) -> None:
    """Parameter number k in the order of names: a sine wave of phase k; normalisation weights are about 1."""
    for k, (name, parameter) in enumerate(sorted(module.named_parameters())):
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = wave(tuple(parameter.shape), k, 0.2) + offset


def wave(shape: tuple[int, ...], phase: float, scale: float) -> Tensor:
    return (torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.37 + phase) * scale).reshape(shape).float()
