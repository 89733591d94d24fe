"""Averages of weights against their definitions: half-life, ramp-up, and the power function's profile."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.train.optimization.ema import Average, Averages, Ema, PowerEma, power_exponent


class Vector(nn.Module):
    """A module of one parameter."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.weight = nn.Parameter(values.clone())


def profile(average: Average[Any], steps: int, batch: int) -> Tensor:
    """How much the weights of each step count: the average of unit vectors."""
    for step, unit in enumerate(torch.eye(steps, dtype=torch.float64)):
        average.update([unit], batch, (step + 1) * batch / 1000)
    return average.module.weight.detach()


def random_steps(steps: int, seed: int) -> Iterator[list[Tensor]]:
    """New weights for `small_network`, step by step."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield [torch.randn(p.shape, generator=rng) for p in small_network().parameters()]


def small_network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False))


def test_after_one_halflife_the_average_is_halfway() -> None:
    ema = Ema(Vector(torch.tensor([0.0, 8.0], dtype=torch.float64)), halflife_kimg=1.5, rampup_ratio=None)
    for step in range(15):
        ema.update([torch.tensor([1.0, 4.0], dtype=torch.float64)], 100, (step + 1) / 10)
    assert ema.module.weight.tolist() == pytest.approx([0.5, 6.0], rel=1e-12)


def test_rampup_bounds_the_halflife_by_what_was_seen() -> None:
    """EDM's formula in a loop of floats; the ramp-up ends after 40 steps of 80."""
    ratio, halflife, batch, values = 0.25, 320.0, 32, torch.randn(80, generator=torch.Generator().manual_seed(0)).tolist()
    expected, seen = 0.0, 0
    ema = Ema(Vector(torch.zeros(1, dtype=torch.float64)), halflife / 1000, rampup_ratio=ratio)
    for value in values:
        seen += batch
        beta = 0.5 ** (batch / (seen * ratio if seen < halflife / ratio else halflife))
        expected = beta * expected + (1 - beta) * value
        ema.update([torch.tensor([value], dtype=torch.float64)], batch, seen / 1000)
        assert ema.module.weight.item() == pytest.approx(expected, rel=1e-12)


def test_buffers_are_copied_and_the_source_is_left_alone() -> None:
    network = small_network()
    ema = Ema(network, halflife_kimg=5.0, rampup_ratio=None)
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert not ema.module.training
    network(torch.randn(16, 5, generator=torch.Generator().manual_seed(1)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    ema.update(network.parameters(), 16, 0.016, network.buffers())
    for name, buffer in network.named_buffers():
        assert torch.equal(dict(ema.module.named_buffers())[name], buffer), name
    assert int(dict(network.named_buffers())["1.num_batches_tracked"]) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_exponent_is_the_printed_one(std: float, gamma: float) -> None:
    assert power_exponent(std) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("std", [0.005, 0.02, 0.05, 0.1, 0.2, 0.28])
def test_exponent_gives_the_width_by_quadrature(std: float) -> None:
    s = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = s ** power_exponent(std)
    density /= density.sum()
    mean = (density * s).sum()
    assert (density * (s - mean) ** 2).sum().sqrt().item() == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize("std", [0.0, 0.004, 0.2887, -0.1, float("nan"), float("inf")])
def test_widths_out_of_range_are_refused(std: float) -> None:
    with pytest.raises(RequestError, match=r"is out of range; give 0.005 to 0.28"):
        PowerEma(small_network(), std)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.25])
def test_power_average_weighs_by_its_profile(std: float) -> None:
    """Each step counts as the integral of t^gamma over its images; the initial weights, here 1e9, do not count at all."""
    steps, gamma = 1000, power_exponent(std)
    weights = profile(PowerEma(Vector(torch.full((steps,), 1e9, dtype=torch.float64)), std), steps, batch=48)
    ends = torch.arange(steps + 1, dtype=torch.float64) / steps
    torch.testing.assert_close(weights, (ends ** (gamma + 1)).diff(), rtol=1e-9, atol=1e-15)
    middles = (ends[1:] + ends[:-1]) / 2
    torch.testing.assert_close(weights, middles**gamma / (middles**gamma).sum(), rtol=0, atol=1e-3 * weights.max().item())
    mean = (weights * middles).sum()
    assert (weights * (middles - mean) ** 2).sum().sqrt().item() == pytest.approx(std, rel=1e-3)


def test_power_average_does_not_depend_on_how_images_are_batched() -> None:
    """Weights that stay for 12 images are the same whether one step counts them or twelve do."""
    values = torch.randn(50, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole, single = (PowerEma(Vector(torch.zeros(4, dtype=torch.float64)), 0.1) for _ in range(2))
    for step, value in enumerate(values):
        whole.update([value], 12, (step + 1) * 12 / 1000)
        for image in range(12):
            single.update([value], 1, (step * 12 + image + 1) / 1000)
    torch.testing.assert_close(whole.module.weight, single.module.weight, rtol=1e-12, atol=1e-13)


def test_several_averages_are_those_that_each_would_be_alone() -> None:
    network = small_network()
    averages = Averages(network, (5.0, 0.1), (0.05, 0.1), rampup_ratio=0.05)
    alone = [Ema(network, 5.0, 0.05), Ema(network, 0.1, 0.05), PowerEma(network, 0.05), PowerEma(network, 0.1)]
    for step, weights in enumerate(random_steps(30, seed=3)):
        averages.update(iter(weights), 128, (step + 1) * 0.128, iter(list(network.buffers())))
        for average in alone:
            average.update(weights, 128, (step + 1) * 0.128, network.buffers())
    modules = averages.modules()
    assert list(modules) == ["halflife-5kimg", "halflife-0.1kimg", "power-0.05", "power-0.1"]
    assert averages.primary.module is modules["halflife-5kimg"]
    for module, average in zip(modules.values(), alone, strict=True):
        assert_same_state(module, average.module)
    first = [module.state_dict()["0.weight"] for module in modules.values()]
    assert all(not torch.allclose(a, b) for i, a in enumerate(first) for b in first[:i])


def test_continues_from_its_state_to_the_bit() -> None:
    def build() -> Averages[nn.Module]:
        torch.manual_seed(4)
        return Averages(small_network(), (1.0,), (0.05, 0.2), rampup_ratio=0.05)

    straight, resumed = build(), build()
    file = io.BytesIO()
    for step, weights in enumerate(random_steps(20, seed=5)):
        if step == 11:
            torch.save(straight.state_dict(), file)
            file.seek(0)
            resumed.load_state_dict(torch.load(file, weights_only=True))
        for averages in (straight, resumed) if step >= 11 else (straight,):
            averages.update(weights, 64, (step + 1) * 0.064)
    for name, module in straight.modules().items():
        assert_same_state(resumed.modules()[name], module)


def test_a_state_of_other_averages_is_refused() -> None:
    network = small_network()
    state = Averages(network, (1.0,), (0.05,), rampup_ratio=None).state_dict()
    with pytest.raises(FileFormatError, match=r"holds the averages halflife-1kimg, power-0.05, not halflife-1kimg;"):
        Averages(network, (1.0,), rampup_ratio=None).load_state_dict(state)


@pytest.mark.parametrize(
    ("halflives", "widths", "message"),
    [((), (0.05,), "no half-life"), ((5.0, 5.0), (), "halflife-5kimg, halflife-5kimg are the same")],
)
def test_averages_that_make_no_sense_are_refused(halflives: tuple[float, ...], widths: tuple[float, ...], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Averages(small_network(), halflives, widths, rampup_ratio=None)


def assert_same_state(module: nn.Module, other: nn.Module) -> None:
    for (name, tensor), expected in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name
