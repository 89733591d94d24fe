"""Averages of any width after training, from snapshots of power-function averages (Karras et al. 2024, arXiv 2312.02696).

See section 3.2 and appendix C of the paper. A snapshot is the average of the weights over training time with a known profile.
A weighted sum of snapshots is the average with the weighted sum of their profiles. So another average is reconstructed by
finding coefficients whose sum of profiles is close to the wanted profile.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.system.files import atomic_file
from uni_instruct.train.optimization.ema import power_exponent

_FILE_NAME = re.compile(r"power-(\d\.\d+)-(\d+\.\d{3})kimg\.safetensors")
# Above this distance of the profiles, relative to the wanted profile's norm, the user is warned. With widths 0.05 and 0.10 and
# a dozen snapshot times, it is at most 0.01 for widths between them, 0.17 for width 0.02, and 0.36 halfway between two times.
_TOLERATED_DISTANCE = 0.25

_log = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """A stored average: the training time in kimg, the profile's width relative to that time, and the file."""

    kimg: float
    std: float
    path: Path


def save_snapshot(folder: Path, kimg: float, std: float, weights: Mapping[str, Tensor]) -> None:
    """Write the weights of a power-function average of width std at time kimg. Replaces one of the same time and width.

    The file name keeps the time to one image. Raises RequestError for a time or width out of range, DiskError if writing fails.
    """
    power_exponent(std)
    if round(kimg, 3) <= 0:
        raise RequestError(
            f"time {kimg:g} kimg of a snapshot is not positive", remedy="save the snapshot after at least one step"
        )
    # Serialised to bytes and written by Python, because Python's error says that the disk is full.
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    with atomic_file(folder / f"power-{float(std)!r}-{kimg:012.3f}kimg.safetensors") as partial:
        partial.write_bytes(content)


def list_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder, ordered by time, then width. An empty list if there is no such folder."""
    found = [(match, path) for path in folder.glob("power-*") if (match := _FILE_NAME.fullmatch(path.name))]
    return sorted(Snapshot(float(match[2]), float(match[1]), path) for match, path in found)


def reconstruct(folder: Path, std: float, kimg: float | None = None) -> dict[str, Tensor]:
    """The weights, float32 on the CPU, of the power-function average of width std at kimg (default: the last snapshot's).

    Reads one tensor of one file at a time, so memory is a few times the result's (sums are float64), for any number of
    snapshots. Integer tensors cannot be averaged and are taken from the newest snapshot. Logs a warning if the snapshots cannot
    express that average well. Raises RequestError if there are no snapshots, the width is out of range or the time is not
    covered, FileFormatError for a corrupt snapshot.
    """
    snapshots = list_snapshots(folder)
    if not snapshots:
        raise RequestError(
            f"{folder} has no snapshots of averages",
            remedy="give a run that was trained with snapshots, as with --set distillation.ema_power_std=[0.05,0.1]",
        )
    last = snapshots[-1].kimg
    kimg = last if kimg is None else kimg
    if not 0 < round(kimg, 3) <= last:
        raise RequestError(
            f"time {kimg:g} kimg is not covered by the snapshots in {folder}", remedy=f"give more than 0, up to {last:g}"
        )
    times, widths = [s.kimg for s in snapshots], [s.std for s in snapshots]
    coefficients = solve_coefficients(times, widths, kimg, std)
    _warn_if_far(coefficients, _inner_products([*times, kimg], [*widths, std]), f"width {std:g} at {kimg:g} kimg")
    sums: dict[str, Tensor] = {}
    for snapshot, coefficient in zip(snapshots, coefficients.tolist(), strict=True):
        _add(sums, snapshot.path, coefficient)
    return {name: _narrowed(sums.pop(name)) for name in list(sums)}


# With A_ij = <p_i, p_j>, b_i = <p_i, p>: A x + mu 1 = b and 1.x = 1, the stationary point of |sum x_i p_i - p|^2 / 2.
def solve_coefficients(t_in: Sequence[float], std_in: Sequence[float], t_out: float, std_out: float) -> Tensor:
    """Coefficients of the averages with times t_in and widths std_in that best express the one of t_out, std_out: float64 [N].

    Least squares over training time, min_x |sum_i x_i p_i - p|^2 as in the paper, but with the constraint sum_i x_i = 1, since
    every profile integrates to 1. Without it, constant weights would be scaled, and all others would be less accurate.
    """
    products = _inner_products([*t_in, t_out], [*std_in, std_out])
    norms = products.diagonal().sqrt()
    cosines = products / norms / norms[:, None]  # profiles of norm 1 give a better conditioned system
    n = len(t_in)
    # Stationarity and constraint in one linear system. Its last unknown is the Lagrange multiplier mu.
    system = cosines.clone()
    system[n, :n] = system[:n, n] = norms[n] / norms[:n]
    system[n, n] = 0
    wanted = torch.cat([cosines[:n, n], cosines.new_ones(1)])
    # gelsd uses singular values, because two snapshots may be almost equal and the system then almost singular.
    solution: Tensor = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:n, 0]
    return solution * norms[n] / norms[:n]


# <p_i, p_j> = a_i a_j / (a_i + a_j - 1) * m^(a_i + a_j - 1) / (t_i^a_i t_j^a_j), a = gamma + 1, m = min(t_i, t_j):
# the integral of the product of both profiles, up to the end of the earlier one (arXiv 2312.02696, appendix C).
def _inner_products(times: Sequence[float], stds: Sequence[float]) -> Tensor:
    """The integrals of p_i p_j over training time, float64 [N, N], for p(s) = (gamma + 1) s^gamma / t^(gamma + 1) on 0..t."""
    t = torch.tensor(times, dtype=torch.float64)
    a = torch.tensor([power_exponent(std) + 1 for std in stds], dtype=torch.float64)
    overlap = torch.minimum(t, t[:, None])
    reached = (overlap / t) ** a  # (m / t_j)^a_j, the part of p_j's integral before the earlier end
    return a * a[:, None] / (a + a[:, None] - 1) * reached * reached.T / overlap


def _warn_if_far(coefficients: Tensor, products: Tensor, wanted: str) -> None:
    """Log a warning if the sum of profiles is far from the wanted profile, which is the last row of `products`."""
    # |sum x_i p_i - p|^2 / |p|^2 with |sum x_i p_i - p|^2 = (x, -1) A (x, -1)^T; |p|^2 is A's last diagonal element.
    difference = torch.cat([coefficients, coefficients.new_full((1,), -1.0)])
    distance = float((difference @ products @ difference / products[-1, -1]).clamp(min=0).sqrt())
    if distance > _TOLERATED_DISTANCE:
        _log.warning(
            "the average of %s is only approximate: its profile differs by %.0f %% from the wanted one; choose a time and a "
            "width closer to those of the snapshots",
            wanted,
            100 * distance,
        )


def _add(sums: dict[str, Tensor], path: Path, coefficient: float) -> None:
    """Add coefficient times the file's tensors to the sums, in float64. The first file creates the sums."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if sums and sums.keys() != set(names):
                raise _unlike_others(path)
            for name in names:
                _add_tensor(sums, name, file.get_tensor(name), coefficient, path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise FileFormatError(f"snapshot {path} cannot be read: {reason}", remedy="remove that file") from error


def _add_tensor(sums: dict[str, Tensor], name: str, tensor: Tensor, coefficient: float, path: Path) -> None:
    # Integer tensors, such as step counters, are not averaged: the newest snapshot is read last and wins.
    if not tensor.is_floating_point():
        sums[name] = tensor
    elif name not in sums:
        sums[name] = tensor.double() * coefficient
    elif sums[name].shape != tensor.shape:  # add_ would broadcast without an error
        raise _unlike_others(path)
    else:
        sums[name].add_(tensor, alpha=coefficient)


def _narrowed(total: Tensor) -> Tensor:
    return total.float() if total.is_floating_point() else total


def _unlike_others(path: Path) -> FileFormatError:
    return FileFormatError(
        f"snapshot {path} has other tensor names or shapes than the snapshots before it", remedy="remove that file"
    )
