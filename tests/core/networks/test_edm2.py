"""EDM2's network has EDM2's parameter names and numerics, and keeps its weights at unit magnitude while it learns.

peer_numbers/edm2.json was made by EDM2's own Precond and UNet (github.com/NVlabs/edm2, commit 4bf8162, torch 2.13 on a CPU,
32 bits) from weights and inputs that are sine waves, as `fill` and `wave` write them below: of every variant a hash of names
and shapes and every stride-th output value, of three steps of plain gradient descent in training mode the same, and the
number of parameters of every published size at 64x64x4 latents of 1000 classes.
"""

import copy
import hashlib
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from builders.paths import PEER_NUMBERS
from uni_instruct.errors import RequestError
from uni_instruct.networks.critic import Critic
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.edm2 import EDM2, MPConv, magnitude, mp_cat, mp_silu, mp_sum, resample

RECORDED: dict[str, Any] = json.loads((PEER_NUMBERS / "edm2.json").read_text())
SIGMA = torch.tensor([0.05, 0.9, 20.0]).reshape(3, 1, 1, 1)


@pytest.mark.parametrize("name", RECORDED["variants"])
def test_names_and_numerics_are_those_of_edm2(name: str) -> None:
    recorded = RECORDED["variants"][name]
    denoiser = filled(name).eval()
    names = "\n".join(f"{key} {list(value.shape)}" for key, value in sorted(denoiser.model.state_dict().items()))
    assert hashlib.sha256(names.encode()).hexdigest() == recorded["names_sha256"]
    with torch.no_grad():
        out = denoiser(picture(denoiser), SIGMA, torch.tensor([1, -1, 2]))
    assert distance(out.flatten()[:: recorded["stride"]], recorded["outputs"]) < 1e-5


def test_training_goes_the_way_of_edm2() -> None:
    """Three steps, each of which normalises the weights: the gradients are EDM2's as well."""
    recorded = RECORDED["training"]
    denoiser = filled(recorded["variant"]).train()
    descent = torch.optim.SGD(denoiser.parameters(), lr=recorded["rate"])
    x = picture(denoiser)
    for expected in recorded["outputs"]:
        out = denoiser(x, SIGMA, torch.tensor([1, 7, 4]))
        assert distance(out.detach().flatten()[:: recorded["stride"]], expected) < 1e-5
        (out - wave(tuple(x.shape), 1.0, 0.5)).square().mean().backward()
        descent.step()
        descent.zero_grad()
    assert distance(torch.tensor(recorded["outputs"][-1]), recorded["outputs"][0]) > 0.03


@pytest.mark.parametrize("size", RECORDED["parameters"])
def test_published_sizes_have_as_many_parameters(size: str) -> None:
    recorded = RECORDED["parameters"][size]
    with torch.device("meta"):
        model = EDM2((4, 64, 64), 1000, model_channels=recorded["model_channels"])
    assert sum(parameter.numel() for parameter in model.parameters()) == recorded["count"]
    assert (model.bottleneck_channels, model.emb_channels) == (4 * recorded["model_channels"],) * 2


def test_layers_keep_magnitude() -> None:
    """Of independent N(0, 1) inputs, whatever the magnitude of the weights; the embedding and the Fourier features too."""
    torch.manual_seed(0)
    a, b = torch.randn(64, 48, 8, 8), torch.randn(64, 48, 8, 8)
    conv = MPConv(48, 40, 3)
    conv.weight.data *= 17
    inner = conv(a)[:, :, 1:-1, 1:-1]
    assert inner.square().mean().sqrt().item() == pytest.approx(1, rel=0.03)
    assert mp_silu(a).square().mean().sqrt().item() == pytest.approx(1, rel=0.01)
    for balance in (0.0, 0.3, 1.0):
        assert mp_sum(a, b, balance).square().mean().sqrt().item() == pytest.approx(1, rel=0.01)
        both = mp_cat(a, b[:, :24], balance)
        assert both.square().mean().sqrt().item() == pytest.approx(1, rel=0.01)
        share = (both[:, 48:].square().sum() / both.square().sum()).item()
        assert share == pytest.approx(balance**2 / (balance**2 + (1 - balance) ** 2), abs=0.01)
    model = filled("classes").model
    torch.nn.init.normal_(model.emb_fourier.freqs, std=6)
    torch.nn.init.uniform_(model.emb_fourier.phases, 0, 6.283)
    features = model.emb_fourier(torch.randn(2000))
    assert features.square().mean().sqrt().item() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize("up", [True, False])
def test_default_filter_resamples_as_its_convolution_does(up: bool) -> None:
    x, taps = torch.randn(2, 3, 4, 6), torch.full((3, 1, 2, 2), 0.25)
    convolve = torch.nn.functional.conv_transpose2d if up else torch.nn.functional.conv2d
    expected = convolve(x, taps * 4 if up else taps, stride=2, groups=3)
    torch.testing.assert_close(resample(x, (1, 1), up=up), expected)
    torch.testing.assert_close(resample(x, (2.0, 2.0), up=up), expected)


def test_weights_are_normalised_in_training_alone_and_once_a_change() -> None:
    denoiser = filled("classes")
    x, before = picture(denoiser), copy.deepcopy(denoiser.state_dict())
    evaluated = denoiser.eval()(x, SIGMA)
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())

    descent = torch.optim.Adam(denoiser.parameters(), lr=0.1)
    torch.testing.assert_close(denoiser.train()(x, SIGMA), evaluated, rtol=1e-4, atol=1e-4)
    denoiser(x, SIGMA).square().mean().backward()
    descent.step()
    assert max(errors(denoiser)) > 0.01
    denoiser(x, SIGMA)
    assert max(errors(denoiser)) < 1e-5
    changed = {name: value._version for name, value in denoiser.named_parameters()}
    denoiser(x, SIGMA)
    with torch.no_grad():
        denoiser(x, SIGMA)
    assert {name: value._version for name, value in denoiser.named_parameters()} == changed


def test_a_state_taken_between_passes_resumes_to_the_bit() -> None:
    """Normalising what is normalised changes nothing, so a resumed run is the one that was not interrupted."""
    denoiser = filled("every knob").train()
    x = picture(denoiser)
    denoiser(x, SIGMA)
    resumed = filled("every knob").train()
    resumed.load_state_dict(denoiser.state_dict())
    copied = copy.deepcopy(denoiser)
    for other in (resumed, copied):
        assert torch.equal(other(x, SIGMA), denoiser(x, SIGMA))
        assert all(torch.equal(value, denoiser.state_dict()[name]) for name, value in other.state_dict().items())


def test_several_passes_before_one_backward_pass_have_the_gradients_of_each() -> None:
    """A critic sees the student's images and the data before it learns from both."""
    denoiser = filled("classes").train()
    first, second = picture(denoiser), wave((3, 3, 16, 16), 2.0, 1.0)
    (denoiser(first, SIGMA).square().mean() + denoiser(second, SIGMA).square().mean()).backward()
    both = [parameter.grad.clone() for parameter in denoiser.parameters() if parameter.grad is not None]
    denoiser.zero_grad()
    for x in (first, second):
        denoiser(x, SIGMA).square().mean().backward()
    for together, apart in zip(both, (p.grad for p in denoiser.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-7)


def test_gradients_are_those_of_finite_differences() -> None:
    model = EDM2((1, 4, 4), 2, model_channels=4, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(2,), channels_per_head=4)
    fill(model)
    model.double().eval()
    x, label = wave((1, 1, 4, 4), 0.5, 1.0).double().requires_grad_(), torch.eye(2)[:1]
    weight = model.enc["2x2_block0"].conv_res1.weight

    def network(x: Tensor, weight: Tensor) -> Tensor:
        swapped = {"enc.2x2_block0.conv_res1.weight": weight}
        return torch.func.functional_call(model, swapped, (x, torch.tensor([0.3], dtype=torch.float64), label))

    torch.autograd.gradcheck(network, (x, weight.detach().requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("training", [True, False])
def test_function_transforms_give_autograds_gradients_and_leave_the_weights_alone(training: bool) -> None:
    denoiser = filled("classes").train(training)
    before = copy.deepcopy(denoiser.state_dict())
    x, parameters = picture(denoiser), dict(denoiser.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        return torch.func.functional_call(denoiser, parameters, (x[None], sigma[None])).square().sum()

    per_image = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, SIGMA)
    in_x = torch.func.grad(lambda x: denoiser(x, SIGMA).square().sum())(x)
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    x.requires_grad_()
    denoiser.eval()(x, SIGMA).square().sum().backward()
    torch.testing.assert_close(in_x, x.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in parameters.items():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(per_image[name].sum(0), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()) + 1e-9)


def test_bf16_autocast_trains_32_bit_weights_along_the_same_gradient() -> None:
    denoiser = filled("classes").train()
    x, gradients = picture(denoiser), []
    for enabled in (False, True):
        denoiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = denoiser(x, SIGMA, torch.tensor([1, 7, 4])).square().mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in denoiser.parameters() if p.grad is not None]))
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float32}
    assert max(errors(denoiser)) < 1e-5
    assert 1e-4 < distance(gradients[1], gradients[0]) < 0.05


def test_no_class_is_the_zero_label_which_still_takes_its_share() -> None:
    denoiser = filled("classes").eval()
    model, noise = denoiser.model, torch.tensor([0.1, 0.2])
    hidden = model.embed(noise, torch.zeros(2, 10))
    torch.testing.assert_close(model.embed(noise, None), hidden, rtol=0, atol=0)
    half = mp_silu(model.emb_noise(model.emb_fourier(noise)) * 0.5 / math.sqrt(0.5))
    torch.testing.assert_close(hidden, half)
    assert distance(model.embed(noise, torch.eye(10)[:2]), hidden) > 0.1


def test_one_noise_level_stands_for_a_batch() -> None:
    """As engines give it, so that all that follows from it alone is a constant."""
    denoiser = filled("classes").eval()
    x, class_ids = picture(denoiser), torch.tensor([1, 7, -1])
    torch.testing.assert_close(denoiser(x, SIGMA[:1], class_ids), denoiser(x, SIGMA[:1].expand(3, 1, 1, 1), class_ids))


@pytest.mark.parametrize("discriminator", ["shared", "own"])
def test_critic_sees_the_encoder(discriminator: str) -> None:
    denoiser = filled("classes").train()
    critic = Critic(denoiser, discriminator)
    x, class_ids = picture(denoiser), torch.tensor([1, 7, -1])
    denoised, logits = critic(x, SIGMA, class_ids)
    torch.testing.assert_close(denoised, denoiser(x, SIGMA, class_ids))
    assert logits.tolist() == [0, 0, 0]
    torch.manual_seed(0)
    torch.nn.init.normal_(critic.head.logit.weight)
    critic(x, SIGMA, class_ids, denoise=False).logits.sum().backward()
    grown = {name for name, parameter in critic.named_parameters() if parameter.grad is not None}
    prefix = "fake_score." if discriminator == "shared" else "own_encoder."
    assert {name for name in grown if not name.startswith("head.")} == {
        f"{prefix}model.{name}" for name, _ in denoiser.model.named_parameters() if name.startswith(("enc.", "emb_"))
    }
    assert max(errors(critic)) < 1e-5


def test_any_resolution_that_the_levels_divide_and_what_does_not_fit() -> None:
    small = {"model_channels": 16, "channel_mult": (1, 2, 2), "num_blocks": 1, "channels_per_head": 16}
    model = EDM2((3, 12, 8), attn_resolutions=(), **small)
    assert model(torch.zeros(2, 3, 12, 8), torch.zeros(2)).shape == (2, 3, 12, 8)
    assert "3x2_in0" in model.dec
    with pytest.raises(RequestError, match="resolution 8x10 is not divisible by 4; use fewer than 3 levels"):
        EDM2((3, 10, 8), **small)
    with pytest.raises(RequestError, match="32 channels cannot be divided among 3 attention heads"):
        EDM2((3, 8, 8), **{**small, "channels_per_head": 10})
    with pytest.raises(RequestError, match=r"resample_filter \[1, 2, 1\] has 3 taps; give an even number"):
        EDM2((3, 8, 8), resample_filter=(1, 2, 1), **small)


def filled(name: str) -> Denoiser:
    variant = RECORDED["variants"][name]
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in variant["args"].items()}
    model = EDM2(tuple(variant["image_shape"]), variant["num_classes"], **args)
    fill(model)
    return Denoiser(model, tuple(variant["image_shape"]), variant["num_classes"])


def fill(model: torch.nn.Module) -> None:
    """Tensor number k in the order of names: a sine wave of phase k; gains lie about 0.5."""
    for k, (_, parameter) in enumerate(sorted(model.named_parameters())):
        parameter.data = wave(tuple(parameter.shape), k, 1.5) if parameter.ndim else torch.tensor(0.5 + 0.3 * math.sin(k))
    for k, (_, buffer) in enumerate(sorted(model.named_buffers())):
        buffer.data = wave(tuple(buffer.shape), 0.2 + k, 3.0)


def picture(denoiser: Denoiser) -> Tensor:
    return wave((3, *denoiser.image_shape), 0.5, 2.0)


def wave(shape: tuple[int, ...], phase: float, scale: float) -> Tensor:
    return (torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 0.37 + phase) * scale).reshape(shape).float()


def errors(module: torch.nn.Module) -> list[float]:
    """Of every layer, how far a row's magnitude is from 1 at most."""
    weights = [layer.weight.detach() for layer in module.modules() if isinstance(layer, MPConv)]
    return [(magnitude(weight, tuple(range(1, weight.ndim))) - 1).abs().max().item() for weight in weights]


def distance(values: Tensor, expected: Tensor | list[float]) -> float:
    """Relative to what is expected."""
    expected = torch.as_tensor(expected)
    return ((values - expected).norm() / expected.norm()).item()
