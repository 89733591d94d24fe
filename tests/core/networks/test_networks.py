"""DDPM++, NCSN++ and ADM have EDM's parameter names and numerics, and the sampler is EDM's: see builders/edm_numbers.py."""

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from builders.edm_numbers import RECORDED, SIGMA, filled, inputs, spec_of, wave
from uni_instruct.errors import RequestError
from uni_instruct.networks.adm import ADM
from uni_instruct.networks.blocks import Conv2d, attention
from uni_instruct.networks.build import build_denoiser
from uni_instruct.networks.critic import Critic
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.group_norm import ChannelsLastGroupNorm, GroupNorm
from uni_instruct.networks.preconditioning import EDM
from uni_instruct.sampler import heun_sample
from uni_instruct.schedule import KarrasLevels, LogNormalLevels, NoiseLevels, sampling_sigmas
from uni_instruct.spec import ModelSpec

CRITICS = ("conditional", "three-levels-residual-skip", "three-levels-skip-skip", "adm-classes-augmented", "iddpm-adm")
# Of 32-bit sums, on every processor. The noise labels of VP reach 999, and NCSN++ multiplies them by up to 300 before it takes
# the sine: one last bit of a label, in which processors differ, is 1.4e-4 of an image.
TOLERANCE, TOLERANCE_VP_NCSNPP = 3e-5, 5e-4


@pytest.mark.parametrize("name", RECORDED["variants"])
def test_names_and_numerics_are_those_of_edm(name: str) -> None:
    recorded = RECORDED["variants"][name]
    denoiser = filled(name)
    assert names_sha256(denoiser) == recorded["names_sha256"]
    with torch.no_grad():
        out = denoiser(*inputs(name))
    tolerance = TOLERANCE_VP_NCSNPP if name == "vp-ncsnpp" else TOLERANCE
    assert_recorded(out, recorded["norms"], recorded["outputs"], recorded["stride"], tolerance)


@pytest.mark.parametrize("name", [name for name, recorded in RECORDED["variants"].items() if "gradient" in recorded])
def test_gradients_are_those_of_edm(name: str) -> None:
    recorded = RECORDED["variants"][name]
    x, *rest = inputs(name)
    out = filled(name)(x.requires_grad_(), *rest)
    (gradient,) = torch.autograd.grad((out * wave(tuple(out.shape), 1.0, 1.0)).sum(), x)
    assert_recorded(gradient, recorded["gradient_norms"], recorded["gradient"], recorded["stride"])


@pytest.mark.parametrize("name", RECORDED["sizes"])
def test_published_sizes_have_the_names_and_parameters_of_edm(name: str) -> None:
    recorded = RECORDED["sizes"][name]
    with torch.device("meta"):
        denoiser = build_denoiser(spec_of(recorded))
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == recorded["parameters"]
    assert names_sha256(denoiser) == recorded["names_sha256"]


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_untrained_networks_are_nearly_the_skip_connection(architecture: str) -> None:
    """ADM exactly: its last layer starts at zero."""
    torch.manual_seed(0)
    spec = ModelSpec(
        name="test", noise_shape=(3, 16, 16), num_classes=10, network=architecture, network_args={"model_channels": 64}
    )
    denoiser = build_denoiser(spec).eval()
    x, class_ids = torch.randn(3, 3, 16, 16), torch.tensor([0, 1, -1])
    c = denoiser.preconditioning(SIGMA)
    out = denoiser(x, SIGMA, class_ids)
    assert ((out - c.c_skip * x) / c.c_out).abs().max() < (1e-30 if architecture == "adm" else 1e-3)


def test_adm_starts_within_the_inverse_root_of_the_fan_in() -> None:
    """Kaiming's uniform with a gain of sqrt(1/3), biases too; classes at unit variance; the last layers at zero."""
    torch.manual_seed(0)
    model = ADM((3, 16, 16), 50, augment_dim=9, model_channels=64, num_blocks=1)
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner.endswith(("proj", "conv1", "out_conv", "map_augment")):
            assert not parameter.any(), name
        elif owner == "map_label":
            assert parameter.std().item() == pytest.approx(1, rel=0.05)
        elif "norm" not in owner:
            bound = math.prod(model.get_submodule(owner).weight.shape[1:]) ** -0.5
            assert parameter.abs().max() <= bound, name
            assert parameter.numel() < 1000 or parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


@pytest.mark.parametrize(
    ("architecture", "args", "message"),
    [
        ("ncsnpp", {"encoder_type": "dense"}, "encoder_type 'dense' is unknown; choose one of standard, skip, residual"),
        ("ncsnpp", {"decoder_type": "residual"}, "decoder_type 'residual' is unknown; choose one of standard, skip"),
        ("ddpmpp", {"embedding_type": "none"}, "embedding_type 'none' is unknown; choose one of positional, fourier"),
        ("ddpmpp", {"resample_filter": [1, 2, 1]}, "resample_filter [1, 2, 1] cannot double or halve a resolution"),
        ("ddpmpp", {"resample_filter": [1, -1]}, "resample_filter [1, -1] cannot double or halve a resolution"),
        ("ddpmpp", {"channel_mult": []}, "channel_mult is empty; give one multiplier a level"),
        ("adm", {"model_channels": 224}, "224 channels do not divide into 3 heads; make model_channels a multiple of 64"),
        ("adm", {"encoder_type": "skip"}, "network 'adm' has no argument encoder_type; leave it out"),
        ("adm", {"channel_mult_noise": 1}, "network 'adm' has no argument channel_mult_noise; leave it out, or choose one of"),
        ("ddpmpp", {"model_channels": 33}, "num_groups (8); give model_channels as a multiple of 32"),
        ("adm", {"model_channels": 0}, "network 'adm': "),
        ("adm", {"channel_mult_emb": 10**30}, "network 'adm': "),
        ("adm", {"out_channels": 1}, "network.out_channels 1 cannot be set; leave it out"),
    ],
)
def test_arguments_that_make_no_network_are_refused(architecture: str, args: dict[str, Any], message: str) -> None:
    spec = ModelSpec(name="test", noise_shape=(3, 16, 16), network=architecture, network_args=args)
    with pytest.raises(RequestError) as caught:
        build_denoiser(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_of_bfloat16_channels_last_has_torchs_values_and_gradients(silu: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    images, towards = (torch.randn(3, 12, 5, 4, generator=rng).bfloat16() for _ in range(2))
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
    q, k, v = torch.randn(3, 2, 3, 9, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v), expected)
    attended = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert attended.dtype == torch.bfloat16
    torch.testing.assert_close(attended.float(), expected, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_any_resolution_that_the_levels_divide(architecture: str) -> None:
    denoiser = small((12, 8), architecture)
    x = torch.zeros(2, 3, 12, 8)
    assert denoiser(x, torch.ones(2, 1, 1, 1)).shape == x.shape
    with pytest.raises(RequestError, match="resolution 8x10 is not divisible by 4; use fewer than 3 levels"):
        small((10, 8), architecture)


@pytest.mark.parametrize("discriminator", ["shared", "own"])
@pytest.mark.parametrize("name", CRITICS)
def test_critic_denoises_as_its_fake_score_and_starts_at_ratio_one(name: str, discriminator: str) -> None:
    denoiser = filled(name)
    critic = Critic(denoiser, discriminator)
    views = inputs(name)
    denoised, logits = critic(*views)
    torch.testing.assert_close(denoised, denoiser(*views))
    assert logits.tolist() == [0, 0, 0]
    torch.nn.init.normal_(critic.head.logit.weight)
    both = critic(*views).logits
    torch.testing.assert_close(critic(*views, denoise=False).logits, both)
    assert both.abs().min() > 0
    both.sum().backward()
    encoder = denoiser.model if critic.own_encoder is None else critic.own_encoder.model
    assert all(parameter.grad is not None for parameter in encoder.enc.parameters())
    assert all(parameter.grad is not None for name, parameter in encoder.named_parameters() if name.startswith("map_"))
    reached = [name for name, parameter in denoiser.named_parameters() if parameter.grad is not None]
    assert bool(reached) == (discriminator == "shared")
    assert not any(name.startswith(("model.dec", "model.out")) for name in reached)


def test_hidden_class_is_the_zero_label() -> None:
    denoiser = filled("conditional")
    x, sigma = torch.randn(2, 3, 16, 16), torch.rand(2, 1, 1, 1) + 0.1
    hidden, none = denoiser(x, sigma, torch.tensor([-1, -1])), denoiser(x, sigma, None)
    torch.testing.assert_close(hidden, none)
    assert not torch.equal(denoiser(x, sigma, torch.tensor([0, 1])), none)


class GaussianDenoiser(Denoiser):
    """The exact denoiser of N(mean, std^2 I)."""

    def __init__(self, mean: float, std: float):
        torch.nn.Module.__init__(self)
        self.mean, self.std, self.preconditioning = mean, std, EDM()

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


def small(resolution: tuple[int, int], architecture: str) -> Denoiser:
    args = {"model_channels": 16, "channel_mult": (1, 2, 2), "num_blocks": 1, "attn_resolutions": ()}
    return build_denoiser(ModelSpec(name="test", noise_shape=(3, *resolution), network=architecture, network_args=args)).eval()


def assert_recorded(
    images: Tensor, norms: list[float], outputs: list[list[float]], stride: int, tolerance: float = TOLERANCE
) -> None:
    """To the tolerance of every image's norm, and of the norm of its recorded values."""
    rows, expected = images.flatten(1), torch.tensor(outputs)
    assert rows.norm(dim=1).tolist() == pytest.approx(norms, rel=tolerance)
    distance = (rows[:, ::stride] - expected).norm(dim=1) / expected.norm(dim=1)
    assert distance.max() < tolerance, distance


def names_sha256(denoiser: Denoiser) -> str:
    names = "\n".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(denoiser.state_dict().items()))
    return hashlib.sha256(names.encode()).hexdigest()
