"""Averages of any width after training, from snapshots of power-function averages (Karras et al. 2024, arXiv 2312.02696).

Section 3.2 and appendix C there. A snapshot is the average of weights over training time by a known profile; a weighted sum
of snapshots is the average by the weighted sum of their profiles, so it only takes weights that come close to another profile.
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
from uni_instruct.files import atomic_file
from uni_instruct.train.optimization.ema import power_exponent

_FILE_NAME = re.compile(r"power-(\d\.\d+)-(\d+\.\d{3})kimg\.safetensors")
# Distance of the profiles, relative to the wanted one's norm, above which the user should know. With widths 0.05 and 0.10 at a
# dozen times it is at most 0.01 for what lies between them and 0.17 for a width of 0.02, but 0.36 halfway between two times.
_TOLERATED_DISTANCE = 0.25

_log = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """A stored average: what training had seen, the profile's width relative to that, and the file."""

    kimg: float
    std: float
    path: Path


def save_snapshot(folder: Path, kimg: float, std: float, weights: Mapping[str, Tensor]) -> None:
    """Writes the weights of a power-function average of width std at kimg; one of the same time and width is replaced.

    The time is kept to one image. Raises RequestError for a time or width out of range, DiskError where writing fails.
    """
    power_exponent(std)
    if round(kimg, 3) <= 0:
        raise RequestError(f"time {kimg:g} kimg of a snapshot is not positive", remedy="average for a step first")
    # As bytes through a Python file, whose errors say that the disk is full.
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()})
    with atomic_file(folder / f"power-{float(std)!r}-{kimg:012.3f}kimg.safetensors") as partial:
        partial.write_bytes(content)


def list_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder by time, then width; none where there is no such folder."""
    found = [(match, path) for path in folder.glob("power-*") if (match := _FILE_NAME.fullmatch(path.name))]
    return sorted(Snapshot(float(match[2]), float(match[1]), path) for match, path in found)


def reconstruct(folder: Path, std: float, kimg: float | None = None) -> dict[str, Tensor]:
    """Weights, float32 on the CPU, of the power-function average of width std at kimg (None: at the last snapshot).

    Reads one tensor of one file at a time: memory is a few times the result's (sums are float64), however many snapshots there
    are. Tensors of integers cannot be averaged and are the newest snapshot's. Logs a warning where the snapshots cannot
    express that average well. Raises RequestError where there are no snapshots, the width is out of range or the time is not
    covered, FileFormatError for a corrupt snapshot.
    """
    snapshots = list_snapshots(folder)
    if not snapshots:
        raise RequestError(
            f"{folder} has no snapshots of averages",
            remedy="name a run that kept some, as with --set distillation.ema_power_std=[0.05,0.1]",
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
    """How to sum averages of times t_in and widths std_in to come closest to the one of t_out, std_out: float64 [N].

    Least squares over training time, min_x |sum_i x_i p_i - p|^2 as in the paper, but subject to sum_i x_i = 1: profiles
    integrate to one. Without that, weights that never move would come out scaled, and others are less accurate as well.
    """
    products = _inner_products([*t_in, t_out], [*std_in, std_out])
    norms = products.diagonal().sqrt()
    cosines = products / norms / norms[:, None]  # profiles of norm 1 are better conditioned
    n = len(t_in)
    # Stationarity and constraint in one system; its last unknown is the constraint's multiplier.
    system = cosines.clone()
    system[n, :n] = system[:n, n] = norms[n] / norms[:n]
    system[n, n] = 0
    wanted = torch.cat([cosines[:n, n], cosines.new_ones(1)])
    # By singular values, as two snapshots may be as good as equal.
    solution: Tensor = torch.linalg.lstsq(system, wanted[:, None], driver="gelsd").solution[:n, 0]
    return solution * norms[n] / norms[:n]


# <p_i, p_j> = a_i a_j / (a_i + a_j - 1) * m^(a_i + a_j - 1) / (t_i^a_i t_j^a_j), a = gamma + 1, m = min(t_i, t_j):
# the integral of both profiles up to where the earlier one ends (arXiv 2312.02696, appendix C).
def _inner_products(times: Sequence[float], stds: Sequence[float]) -> Tensor:
    """integral of p_i p_j over training time, float64 [N, N], with p(s) = (gamma + 1) s^gamma / t^(gamma + 1) on 0..t."""
    t = torch.tensor(times, dtype=torch.float64)
    a = torch.tensor([power_exponent(std) + 1 for std in stds], dtype=torch.float64)
    overlap = torch.minimum(t, t[:, None])
    reached = (overlap / t) ** a  # share of p_j before the earlier of both ends
    return a * a[:, None] / (a + a[:, None] - 1) * reached * reached.T / overlap


def _warn_if_far(coefficients: Tensor, products: Tensor, wanted: str) -> None:
    """The last of the profiles is the wanted one."""
    # |sum x_i p_i - p|^2 = (x, -1) A (x, -1)^T, over |p|^2, which stands in the last corner.
    difference = torch.cat([coefficients, coefficients.new_full((1,), -1.0)])
    distance = float((difference @ products @ difference / products[-1, -1]).clamp(min=0).sqrt())
    if distance > _TOLERATED_DISTANCE:
        _log.warning(
            "the average of %s is approximate: its profile is %.0f %% off; a time and width nearer to the snapshots' is better",
            wanted,
            100 * distance,
        )


def _add(sums: dict[str, Tensor], path: Path, coefficient: float) -> None:
    """Adds coefficient times the file's tensors to the sums, in float64; the first file makes them."""
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
    # Counters of steps and the like have no average.
    if not tensor.is_floating_point():
        sums[name] = tensor
    elif name not in sums:
        sums[name] = tensor.double() * coefficient
    elif sums[name].shape != tensor.shape:  # addition would broadcast
        raise _unlike_others(path)
    else:
        sums[name].add_(tensor, alpha=coefficient)


def _narrowed(total: Tensor) -> Tensor:
    return total.float() if total.is_floating_point() else total


def _unlike_others(path: Path) -> FileFormatError:
    return FileFormatError(f"snapshot {path} holds other weights than the one before it", remedy="remove that file")
