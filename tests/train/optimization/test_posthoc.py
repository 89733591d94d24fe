"""Averages reconstructed from snapshots against the same averages followed during training."""

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from builders.machine import files_of_at_most
from uni_instruct.errors import DiskError, FileFormatError, RequestError
from uni_instruct.train.optimization.ema import PowerEma, power_exponent
from uni_instruct.train.optimization.posthoc import list_snapshots, reconstruct, save_snapshot, solve_coefficients

STORED, FOLLOWED = (0.05, 0.10), (0.05, 0.075, 0.10, 0.12)
STEPS, BATCH, EVERY = 400, 128, 20
LAST_KIMG = STEPS * BATCH / 1000
FILTER = torch.tensor([1.0, 3.0, 3.0, 1.0])


class Walker(nn.Module):
    """Weights that move, a buffer that does not, and one that counts."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filter", FILTER.clone())


@dataclass(frozen=True)
class Training:
    """Snapshots of a random walk of weights, where it began, and the averages of FOLLOWED widths at every snapshot."""

    folder: Path
    start: Tensor
    averages: dict[tuple[float, float], Tensor]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Training:
    folder = tmp_path_factory.mktemp("posthoc")
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(1000, generator=rng)
    module = Walker(weights)
    emas, start, averages = [PowerEma(module, std) for std in FOLLOWED], weights.clone(), {}
    for step in range(1, STEPS + 1):
        kimg = step * BATCH / 1000
        weights += 0.05 * torch.randn(1000, generator=rng)
        for ema in emas:
            ema.update([weights], BATCH, kimg, [torch.tensor(step), FILTER])
            if step % EVERY == 0:
                averages[ema.std, kimg] = ema.module.weight.detach().clone()
                if ema.std in STORED:
                    save_snapshot(folder, kimg, ema.std, ema.module.state_dict())
    return Training(folder, start, averages)


@pytest.mark.parametrize("kimg", [LAST_KIMG, 38.4])
@pytest.mark.parametrize("std", [0.075, 0.12])
def test_other_widths_are_those_that_training_would_have_followed(training: Training, std: float, kimg: float) -> None:
    """The error, as a share of how far the average moved, is 4e-5 to 1.1e-4; the nearest stored one is 0.04 to 0.06 away."""
    weights, truth = reconstruct(training.folder, std, kimg), training.averages[std, kimg]
    assert weights["weight"].dtype == torch.float32
    moved = (truth - training.start).norm()
    assert (weights["weight"] - truth).norm() / moved < 3e-4
    stored = min((training.averages[s, kimg] - truth).norm() for s in STORED)
    assert stored / moved > 0.04, "the widths must differ for this test to mean anything"


@pytest.mark.parametrize("kimg", [None, LAST_KIMG / 2])
@pytest.mark.parametrize("std", STORED)
def test_a_stored_average_comes_back(training: Training, std: float, kimg: float | None) -> None:
    truth = training.averages[std, kimg or LAST_KIMG]
    torch.testing.assert_close(reconstruct(training.folder, std, kimg)["weight"], truth, rtol=1e-6, atol=1e-6)


def test_what_never_moves_stays_and_integers_are_the_newest(training: Training) -> None:
    weights = reconstruct(training.folder, 0.25)
    torch.testing.assert_close(weights["filter"], FILTER, rtol=1e-6, atol=0)
    assert weights["count"].item() == STEPS


def test_coefficients_are_the_best_on_a_grid() -> None:
    """The same problem with profiles sampled on a fine grid: no move that keeps the sum comes closer to the wanted profile."""
    times, stds = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0], [0.05, 0.2] * 3
    s = (torch.arange(300_000, dtype=torch.float64) + 0.5) / 100_000

    def density(t: float, std: float) -> Tensor:
        gamma = power_exponent(std)
        return (gamma + 1) / t * (s / t) ** gamma * (s < t)

    profiles = torch.stack([density(t, std) for t, std in zip(times, stds, strict=True)])
    for t_out, std_out in [(3.0, 0.12), (2.0, 0.03), (2.6, 0.1)]:
        x = solve_coefficients(times, stds, t_out, std_out)
        assert x.dtype == torch.float64
        assert x.sum().item() == pytest.approx(1, abs=1e-12)
        moves = torch.eye(6, dtype=torch.float64).diff(dim=0)
        grid = moves @ profiles
        best = torch.linalg.lstsq(grid.T, density(t_out, std_out) - x @ profiles).solution
        assert best.abs().max() < 1e-3 * x.abs().max()


def test_coefficients_share_where_two_snapshots_are_the_same() -> None:
    x = solve_coefficients([1.0, 2.0, 2.0], [0.1, 0.1, 0.1], 2.0, 0.1)
    torch.testing.assert_close(x, torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_poor_reconstruction_is_announced(training: Training, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        reconstruct(training.folder, 0.12)
        assert not caplog.records
        reconstruct(training.folder, 0.05, 0.975 * LAST_KIMG)
    assert "width 0.05 at 49.92 kimg is only approximate: its profile differs by" in caplog.text


def test_snapshots_are_listed_by_time_with_exact_values(tmp_path: Path) -> None:
    written = [(0.064, 0.1), (9.984, 0.05), (9.984, 0.1), (100_000.128, 0.0625)]
    for kimg, std in reversed(written):
        save_snapshot(tmp_path, kimg, std, {"a": torch.zeros(2)})
    for other in ("power-0.05.safetensors", ".power-0.05-00000001.000kimg.safetensors.7.tmp", "notes.txt"):
        (tmp_path / other).write_text("")
    found = list_snapshots(tmp_path)
    assert [(s.kimg, s.std) for s in found] == written
    assert all(s.path.is_file() for s in found)
    assert list_snapshots(tmp_path / "absent") == []


def test_a_snapshot_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    save_snapshot(tmp_path, 1.0, 0.05, {"a": torch.ones(100)})
    with files_of_at_most(10_000), pytest.raises(DiskError, match="cannot write"):
        save_snapshot(tmp_path, 1.0, 0.05, {"a": torch.zeros(10_000)})
    assert [path.name for path in tmp_path.iterdir()] == ["power-0.05-00000001.000kimg.safetensors"]
    assert torch.equal(reconstruct(tmp_path, 0.05)["a"], torch.ones(100))


@pytest.mark.parametrize(
    ("std", "kimg", "message"),
    [
        (0.3, None, "width 0.3 of a power-function average is out of range; give 0.005 to 0.28"),
        (0.001, None, "width 0.001 of a power-function average is out of range"),
        (0.1, 60.0, r"time 60 kimg is not covered by the snapshots in .*; give more than 0, up to 51.2"),
        (0.1, 0.0, "time 0 kimg is not covered"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused(training: Training, std: float, kimg: float | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        reconstruct(training.folder, std, kimg)


def test_a_folder_without_snapshots_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no snapshots of averages; give a run that was trained with snapshots"):
        reconstruct(tmp_path / "absent", 0.1)


@pytest.mark.parametrize(("kimg", "std"), [(0.0, 0.05), (1.0, 0.5)])
def test_a_snapshot_that_could_not_be_used_is_not_written(tmp_path: Path, kimg: float, std: float) -> None:
    with pytest.raises(RequestError):
        save_snapshot(tmp_path, kimg, std, {"a": torch.zeros(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": torch.zeros(1)}, "has other tensor names or shapes"),  # which addition would broadcast
        ({"a": torch.zeros(4), "b": torch.zeros(1)}, "has other tensor names or shapes"),
        (None, "cannot be read"),
    ],
)
def test_corrupt_snapshots_are_named(tmp_path: Path, other: dict[str, Tensor] | None, message: str) -> None:
    save_snapshot(tmp_path, 1.0, 0.05, {"a": torch.zeros(4)})
    save_snapshot(tmp_path, 2.0, 0.05, {"a": torch.zeros(4)})
    path = list_snapshots(tmp_path)[-1].path
    if other is None:
        path.write_bytes(path.read_bytes()[:-3])
    else:
        save_file(other, path)
    with pytest.raises(FileFormatError, match=f"{path.name}.*{message}"):
        reconstruct(tmp_path, 0.05)
