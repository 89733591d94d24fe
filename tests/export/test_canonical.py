"""The folded one-step module is the original function: every network, preconditioning, patch, with few, many and no classes."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from uni_instruct.bundle import Bundle, shipped_generators
from uni_instruct.export.canonical import MAX_TABLED_CLASSES, CanonicalOneStep
from uni_instruct.export.canonical_blocks import FourDimensionalNorm, NormFactory
from uni_instruct.networks.build import build_denoiser, load_denoiser
from uni_instruct.networks.denoiser import ClassLabels, Denoiser, MixedClasses
from uni_instruct.networks.one_step import OneStep, load_one_step
from uni_instruct.spec import ModelSpec

TOLERANCE = 1e-5  # relative L2, as engines are admitted by
SIGMA = 2.5
SMALL: dict[str, Any] = {"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpmpp": ("ddpmpp", {"model_channels": 16}),
    "ddpmpp, patch 2": ("ddpmpp", {"model_channels": 16, "patch": 2}),
    "ddpmpp, vp": ("ddpmpp", {"model_channels": 16, "preconditioning": "vp"}),
    "ddpmpp, skip paths": ("ddpmpp", {"model_channels": 16, "encoder_type": "skip", "decoder_type": "skip"}),
    "ddpmpp, three levels": ("ddpmpp", {"model_channels": 16, "channel_mult": [1, 2, 2], "decoder_type": "skip"}),
    "ncsnpp": ("ncsnpp", {"model_channels": 16}),
    "ncsnpp, three levels, ve": ("ncsnpp", {"model_channels": 16, "channel_mult": [1, 2, 2], "preconditioning": "ve"}),
    "adm": ("adm", {"model_channels": 64}),
    "adm, iddpm, patch 2": ("adm", {"model_channels": 64, "preconditioning": "iddpm", "patch": 2}),
    "edm2": ("edm2", {"model_channels": 64, "channel_mult_noise": 1}),
    "edm2, two heads, patch 2": ("edm2", {"model_channels": 64, "channels_per_head": 32, "patch": 2}),
}


@pytest.mark.parametrize("norm", [copy.deepcopy, FourDimensionalNorm], ids=["native", "4-D"])
@pytest.mark.parametrize("num_classes", [0, 3, MAX_TABLED_CLASSES + 1])
@pytest.mark.parametrize("case", NETWORKS)
def test_equal_to_the_original(case: str, num_classes: int, norm: NormFactory) -> None:
    network, args = NETWORKS[case]
    spec = ModelSpec(name="t", noise_shape=(3, 16, 16), num_classes=num_classes, network=network, network_args=SMALL | args)
    denoiser = stirred(build_denoiser(spec).eval())
    z = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    class_ids = torch.tensor([2, 0, 1, num_classes - 1, 1]) if num_classes else None
    folded = CanonicalOneStep(OneStep(copy.deepcopy(denoiser), SIGMA), norm)
    assert distance(folded(z, class_ids), original(denoiser, SIGMA, z, class_ids)) < TOLERANCE
    assert not any(isinstance(module, nn.Linear) for module in folded.modules()) or num_classes > MAX_TABLED_CLASSES
    if class_ids is not None:
        mixed = MixedClasses(class_ids, class_ids.flip(0), torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0]))
        assert distance(folded(z, mixed), original(denoiser, SIGMA, z, mixed)) < TOLERANCE
        assert distance(folded(z, mixed), folded(z, class_ids)) > 100 * TOLERANCE
    if class_ids is not None:  # the test could not fail if nothing depended on the class
        assert distance(folded(z, (class_ids + 1) % num_classes), original(denoiser, SIGMA, z, class_ids)) > 100 * TOLERANCE


@pytest.mark.parametrize("name", shipped_generators())
def test_equal_on_trained_weights_for_every_class(name: str) -> None:
    bundle = Bundle.open(name)
    denoiser, classes = load_denoiser(bundle), max(bundle.spec.num_classes, 1)
    z = torch.randn(2 * classes, *bundle.spec.noise_shape, generator=torch.Generator().manual_seed(2))
    class_ids = torch.arange(2 * classes) % classes if bundle.spec.num_classes else None
    for norm in (copy.deepcopy, FourDimensionalNorm):
        folded = CanonicalOneStep(OneStep(copy.deepcopy(denoiser), bundle.spec.sigma_init), norm)
        assert distance(folded(z, class_ids), original(denoiser, bundle.spec.sigma_init, z, class_ids)) < TOLERANCE
        if class_ids is not None:
            mixed = MixedClasses(class_ids, (class_ids + 1) % classes, torch.linspace(0, 1, len(class_ids)))
            assert distance(folded(z, mixed), original(denoiser, bundle.spec.sigma_init, z, mixed)) < TOLERANCE


@torch.no_grad()
def stirred(denoiser: Denoiser) -> Denoiser:
    """With no weight left at the zeros and ones that fresh networks have, which would hide a wrong fold."""
    rng = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        if parameter.ndim < 2 or parameter.abs().max() < 1e-3:
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.3)
    return denoiser


@torch.no_grad()
def original(denoiser: Denoiser, sigma_init: float, z: Tensor, class_ids: ClassLabels | None) -> Tensor:
    out: Tensor = denoiser(z * sigma_init, torch.full((1, 1, 1, 1), sigma_init), class_ids)
    return out


def distance(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def test_the_same_bits_on_any_number_of_threads() -> None:
    """So that the same weights give the same file, whoever exports them."""
    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(CanonicalOneStep(load_one_step(Bundle.open("emoji")), FourDimensionalNorm).state_dict())
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
