"""Every preconditioning has EDM's constants and noise levels, a spec names it, and the sampler keeps to what it knows.

Numbers of `RECORDED` are EDM's own, made as builders/edm_numbers.py says; test_networks.py holds the coefficients to them
through networks. The sampler's are those of EDM's edm_sampler with the variant's network, at the latents written below.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from builders.edm_numbers import RECORDED, filled, inputs, wave
from uni_instruct.bundle import Bundle
from uni_instruct.errors import RequestError
from uni_instruct.networks.build import build_denoiser, build_preconditioning, load_denoiser
from uni_instruct.networks.denoiser import Denoiser
from uni_instruct.networks.network import Network
from uni_instruct.networks.preconditioning import EDM, IDDPM, PRECONDITIONINGS, VE, VP, Preconditioning
from uni_instruct.sampler import heun_sample, supported_sigmas
from uni_instruct.spec import ModelSpec

LEVELS = torch.logspace(-1.9, 1.8, 40).reshape(-1, 1, 1, 1)
TINY = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


@pytest.mark.parametrize("recorded", RECORDED["preconditionings"], ids=lambda recorded: str(recorded["preconditioning"]))
def test_noise_levels_are_those_of_edm(recorded: dict[str, Any]) -> None:
    """To the rounding of exp(x) - 1 at small x, which processors do differently."""
    made = build_preconditioning(recorded["preconditioning"])
    assert made.sigma_min == pytest.approx(recorded["sigma_min"], rel=1e-3, abs=7e-5)
    assert made.sigma_max == pytest.approx(recorded["sigma_max"], rel=1e-5)
    if isinstance(made, IDDPM):
        assert len(made.table) == made.M + 1
        assert made.table[:: max(1, made.M // 50)].tolist() == pytest.approx(recorded["table"], rel=1e-4)


@pytest.mark.parametrize("name", RECORDED["sampler"])
def test_sampler_goes_the_way_of_edm(name: str) -> None:
    recorded, (x, _, class_ids, _) = RECORDED["sampler"][name], inputs(name)
    denoiser = filled(name)
    seen = [sigma for sigma in supported_sigmas(denoiser.preconditioning, 6) for _ in range(2)][1:-2]
    assert seen == pytest.approx(recorded["sigmas"], rel=1e-6)
    images = heun_sample(denoiser, wave(tuple(x.shape), 0.2, 1.4), class_ids, steps=6).flatten(1)
    assert images.norm(dim=1).tolist() == pytest.approx(recorded["norms"], rel=1e-5)
    expected = torch.tensor(recorded["outputs"])
    distance = (images[:, :: RECORDED["variants"][name]["stride"]] - expected).norm(dim=1) / expected.norm(dim=1)
    assert distance.max() < 1e-5


def test_sampler_stays_within_what_the_network_knows() -> None:
    sigmas = supported_sigmas(EDM(sigma_min=0.01, sigma_max=50.0), 7)
    assert (sigmas[0], sigmas[-2], sigmas[-1]) == (pytest.approx(50), pytest.approx(0.01), 0)


@pytest.mark.parametrize("made", [VP(), VE(), IDDPM()], ids=lambda made: made.name)
def test_a_network_that_knows_the_noise_gives_the_clean_image(made: Preconditioning) -> None:
    clean, noise = torch.randn(2, len(LEVELS), 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    known = -noise if made.name == "ve" else noise
    junk = torch.full_like(known, torch.nan)
    output = torch.cat([known] + [junk] * (made.out_factor - 1), dim=1)
    denoiser = Denoiser(Answers(output), (3, 4, 4), preconditioning=made)
    torch.testing.assert_close(denoiser(clean + LEVELS * noise, LEVELS), clean, atol=1e-4, rtol=0)


def test_edm_feeds_and_asks_of_the_network_unit_variance() -> None:
    """For data of deviation sigma_data, and so that the skip connection is the best linear denoiser."""
    c, data = EDM(sigma_data=0.7)(LEVELS), 0.7**2
    total = data + LEVELS**2
    torch.testing.assert_close(c.c_in**2 * total, torch.ones_like(LEVELS))
    torch.testing.assert_close(c.c_out**2, data * (1 - c.c_skip) ** 2 + c.c_skip**2 * LEVELS**2)
    torch.testing.assert_close(c.c_skip, data / total)


def test_vp_tells_the_network_the_time() -> None:
    """sigma(t)^2 = exp(beta_d t^2 / 2 + beta_min t) - 1 is told as t times M - 1."""
    time = torch.linspace(0.05, 1, 20).reshape(-1, 1, 1, 1)
    sigma = torch.sqrt(torch.exp(4 * time**2 / 2 + 0.5 * time) - 1)
    told = VP(beta_d=4.0, beta_min=0.5, M=101)(sigma).c_noise
    torch.testing.assert_close(told, 100 * time, atol=1e-3, rtol=1e-4)


def test_iddpm_rounds_to_the_nearest_level_and_tells_its_number() -> None:
    made = IDDPM()
    alpha_bar = [math.sin(math.pi / 2 * j / 1000 / 1.008) ** 2 for j in range(1001)]
    closed = torch.tensor([math.sqrt(alpha_bar[1000] / alpha - 1) for alpha in alpha_bar[1:]])
    torch.testing.assert_close(made.table[1:], closed, rtol=1e-3, atol=1e-6)
    assert made.table[0] == pytest.approx(math.sqrt((closed[0] ** 2 + 1) / 0.001 - 1), rel=1e-4)
    for sigma in (LEVELS, LEVELS.flatten().double()):
        rounded = made.round_sigma(sigma)
        assert (rounded.shape, rounded.dtype) == (sigma.shape, sigma.dtype)
        nearest = [min(made.table.tolist(), key=lambda level: abs(level - wanted)) for wanted in sigma.flatten().tolist()]
        assert rounded.flatten().tolist() == nearest
    assert torch.equal(made.round_sigma(made.table), made.table)
    assert made(made.table[:1000].reshape(-1, 1, 1, 1)).c_noise.flatten().tolist() == list(range(999, -1, -1))


def test_iddpm_is_the_same_wherever_it_was_made() -> None:
    with torch.device("meta"):
        unusual = IDDPM(M=37)
    with torch.inference_mode():
        levels = IDDPM(M=37).table
    assert torch.equal(unusual.table, levels)
    sigma = LEVELS.clone().requires_grad_()
    unusual(sigma).c_in.sum().backward()
    assert sigma.grad.isfinite().all()
    unusual.table.zero_()
    assert torch.equal(IDDPM(M=37).table, levels)


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ({}, EDM()),
        ({"sigma_data": 0.7}, EDM(sigma_data=0.7)),
        ({"preconditioning": "ve", "sigma_data": 0.7}, VE(sigma_data=0.7)),
        ({"preconditioning": {"name": "edm", "sigma_min": 0.01, "sigma_max": 50.0}}, EDM(sigma_min=0.01, sigma_max=50.0)),
        ({"preconditioning": {"name": "vp", "beta_d": 10, "sigma_data": 0.6}}, VP(beta_d=10, sigma_data=0.6)),
        ({"preconditioning": {"name": "iddpm", "M": 50}}, IDDPM(M=50)),
    ],
)
def test_a_bundle_keeps_its_preconditioning(asked: dict[str, Any], made: Preconditioning, tmp_path: Path) -> None:
    spec = ModelSpec(name="test", noise_shape=(3, 8, 8), network_args=TINY | asked)
    weights = {name: tensor.numpy() for name, tensor in build_denoiser(spec).state_dict().items()}
    Bundle.write(tmp_path / "bundle", spec, weights, card="")
    denoiser = load_denoiser(Bundle.open(tmp_path / "bundle"))
    assert denoiser.preconditioning == made
    assert denoiser.sigma_data == made.sigma_data
    x = torch.randn(2, 3, 8, 8)
    assert denoiser(x, torch.ones(2, 1, 1, 1)).shape == x.shape


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("ddim", "preconditioning 'ddim' is unknown; choose one of edm, vp, ve, iddpm"),
        ({"beta_d": 1}, "preconditioning 'None' is unknown; choose one of edm"),
        ({"name": "vp", "beta": 1}, "preconditioning 'vp' has no constant 'beta'; choose from sigma_data, beta_d"),
        ({"name": "vp", "beta_d": "x"}, "'vp': beta_d 'x' is not a positive number; give beta_d a number above 0"),
        ({"name": "vp", "M": 1000.5}, "preconditioning 'vp': M 1000.5 is out of range; give M a whole number from 2 to"),
        ({"name": "iddpm", "M": 10**9}, "preconditioning 'iddpm': M 1000000000 is out of range"),
        (
            {"name": "iddpm", "C_1": 5.0},
            "preconditioning 'iddpm': noise levels from nan to nan are not a range; choose constants with 0 <= ",
        ),
        ({"name": "ve", "sigma_min": 100}, "preconditioning 've': noise levels from 100 to 100.0 are not a range"),
        ({"name": "ve", "sigma_min": None}, "preconditioning 've': noise levels from None to 100.0 are not a range"),
        ({"name": "edm", "sigma_data": 0}, "preconditioning 'edm': sigma_data 0 is not a positive number"),
        ({"name": "edm", "sigma_data": math.nan}, "preconditioning 'edm': sigma_data nan is not a positive number"),
        (["vp"], "preconditioning '['vp']' is unknown"),
        (7, "preconditioning '7' is unknown"),
        ({"name": []}, "preconditioning '[]' is unknown"),
    ],
)
def test_a_preconditioning_that_is_none_is_refused(asked: object, message: str) -> None:
    spec = ModelSpec(name="test", noise_shape=(3, 8, 8), network_args=TINY | {"preconditioning": asked})
    with pytest.raises(RequestError) as caught:
        build_denoiser(spec)
    assert message in str(caught.value)


def test_the_table_holds_every_preconditioning_by_its_name() -> None:
    assert {name: kind.name for name, kind in PRECONDITIONINGS.items()} == {name: name for name in ("edm", "vp", "ve", "iddpm")}


class Answers(Network):
    """Gives what it was given."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output
        self.emb_channels, self.bottleneck_channels = 1, 3
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()

    def embed(self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None = None) -> Tensor:
        return noise_labels[:, None]

    def encode(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        return [x]

    def decode(self, features: list[Tensor], emb: Tensor) -> Tensor:
        return self.output
