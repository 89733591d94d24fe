"""The way through noise from seed to seed: closed forms, exact ends, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uni_instruct.errors import RequestError
from uni_instruct.noise import Between, noise, noise_at_points, slerp, walk_points

SHAPE = (1, 8, 8)
SEEDS = st.integers(0, 2**63 - 1)
POSITIONS = st.floats(0, 1)


def test_a_quarter_turn_has_its_closed_form() -> None:
    a, b = np.float32([2, 0, 0]), np.float32([0, 2, 0])
    for t in np.linspace(0, 1, 17):
        expected = [2 * np.cos(t * np.pi / 2), 2 * np.sin(t * np.pi / 2), 0]
        np.testing.assert_allclose(slerp(a, b, float(t)), expected, atol=1e-6)


@given(SEEDS, SEEDS, POSITIONS)
def test_the_norm_goes_evenly_from_one_end_to_the_other(first: int, second: int, t: float) -> None:
    a, b = noise([first, second], SHAPE)
    z = slerp(a, b, t)
    assert z.dtype == np.float32
    norms = [float(np.linalg.norm(end.astype(np.float64))) for end in (a, b)]
    assert np.linalg.norm(z.astype(np.float64)) == pytest.approx((1 - t) * norms[0] + t * norms[1], rel=1e-5)


@given(SEEDS, SEEDS, POSITIONS)
def test_the_direction_turns_evenly(first: int, second: int, t: float) -> None:
    a, b = (end.astype(np.float64).ravel() / np.linalg.norm(end) for end in noise([first, second], SHAPE))
    z = slerp(a.astype(np.float32), b.astype(np.float32), t).astype(np.float64)
    whole = np.arccos(np.clip(a @ b, -1, 1))
    turned = np.arccos(np.clip(a @ z / np.linalg.norm(z), -1, 1))
    assert turned == pytest.approx(t * whole, abs=1e-3)


@given(SEEDS, SEEDS)
def test_the_ends_are_the_seeds_noise_bit_for_bit(first: int, second: int) -> None:
    a, b = noise([first, second], SHAPE)
    np.testing.assert_array_equal(slerp(a, b, 0.0), a)
    np.testing.assert_array_equal(slerp(a, b, 1.0), b)
    assert slerp(a, b, 0.0) is not a  # the caller's own
    points = [first, Between(first, second, 0.0), Between(first, second, 1.0), second]
    np.testing.assert_array_equal(noise_at_points(points, SHAPE), noise([first, first, second, second], SHAPE))


def test_noise_on_the_way_is_still_standard_normal() -> None:
    z = noise_at_points([Between(2 * n, 2 * n + 1, 0.5) for n in range(2000)], SHAPE).astype(np.float64)
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    # A straight line would halve it here.
    assert abs(z.var() - 1) < 0.02


@pytest.mark.parametrize("factor", [1.0, -1.0, 3.0])
def test_parallel_and_opposite_noise_stay_on_the_line(factor: float) -> None:
    a = noise([1], SHAPE)[0]
    np.testing.assert_allclose(slerp(a, np.float32(factor) * a, 0.25), (0.75 + 0.25 * factor) * a, rtol=1e-5, atol=1e-6)
    assert not slerp(np.zeros_like(a), np.zeros_like(a), 0.5).any()


def test_positions_count_the_seeds() -> None:
    points = walk_points([7, 8, 9], [0, 0.25, 1.0, 1.5, 2])
    assert points == [7, Between(7, 8, 0.25), 8, Between(8, 9, 0.5), 9]


@pytest.mark.parametrize(
    ("seeds", "position", "problem"),
    [
        ([7, 8], 1.01, "position 1.01 is not on the walk; choose positions from 0 to 1"),
        ([7, 8], -0.5, "position -0.5 is not on the walk"),
        ([7, 8], float("nan"), "position nan is not on the walk"),
        ([7, 8], float("inf"), "position inf is not on the walk"),
        ([7], 0.5, "choose positions from 0 to 0"),
        ([], 0, "the walk has no seeds"),
        ([7, -8], 0, "seed -8 is not an integer"),
    ],
)
def test_what_is_not_on_the_way_is_refused(seeds: list[int], position: float, problem: str) -> None:
    with pytest.raises(RequestError, match=problem.replace(".", r"\.")):
        walk_points(seeds, [position])
