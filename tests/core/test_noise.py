"""One seed is one image: recorded values, independence of batch and order, independent streams."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uni_instruct.errors import RequestError
from uni_instruct.noise import checked_seeds, noise, parse_seeds, random_class_ids

SEEDS = st.integers(0, 2**63 - 1)
LAST = 2**63 - 1
# The product's promise to its users: these never change, whatever the version of Python, NumPy or this package.
GOLDEN_NOISE = {
    0: "0x1.eaca8cp-5 0x1.fddbacp-7 -0x1.2a18a4p+0 -0x1.0fa94cp-3 0x1.1676fcp-1 -0x1.9a98eap-3",
    1: "0x1.1778fp+0 0x1.d2c43cp-2 0x1.6750fcp-1 0x1.23c832p-2 -0x1.d5e69ep-2 0x1.8be448p-2",
    LAST: "0x1.e75b08p-1 -0x1.03c8cep+0 0x1.32b5f4p+0 -0x1.bd2b82p-3 0x1.c1c762p-2 0x1.a09462p-1",
}
GOLDEN_CLASSES = {0: (9, 975), 1: (2, 213), LAST: (9, 979)}


@pytest.mark.parametrize("seed", GOLDEN_NOISE)
def test_latents_have_their_recorded_values(seed: int) -> None:
    expected = [float.fromhex(text) for text in GOLDEN_NOISE[seed].split()]
    assert noise([seed], (1, 2, 3)).ravel().tolist() == expected
    classes = tuple(int(random_class_ids([seed], count)[0]) for count in (10, 1000))
    assert classes == GOLDEN_CLASSES[seed]


@given(st.lists(SEEDS, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_a_seed_does_not_depend_on_its_batch_or_order(seeds: list[int], random: "np.random.Generator") -> None:
    alone = {seed: (noise([seed], (3, 4, 2))[0], random_class_ids([seed], 7)[0]) for seed in seeds}
    shuffled = list(seeds)
    random.shuffle(shuffled)
    for row, label, seed in zip(noise(shuffled, (3, 4, 2)), random_class_ids(shuffled, 7), shuffled, strict=True):
        np.testing.assert_array_equal(row, alone[seed][0])
        assert label == alone[seed][1]


def test_latents_are_standard_normal_and_seeds_are_independent() -> None:
    z = noise(range(4000), (1, 4, 4)).reshape(4000, 16).astype(float)
    assert z.dtype == float
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    assert abs(z.var() - 1) < 4 * np.sqrt(2 / z.size)
    assert abs((z**4).mean() - 3) < 4 * np.sqrt(96 / z.size)
    # Neighbouring seeds and neighbouring pixels.
    for left, right in ((z[1:], z[:-1]), (z[:, 1:], z[:, :-1])):
        assert abs((left * right).mean()) < 4 / np.sqrt(left.size)


def test_classes_are_uniform_and_independent_of_the_noise() -> None:
    count, classes = 20_000, 10
    labels = random_class_ids(range(count), classes)
    expected = count / classes
    chi_square = ((np.bincount(labels, minlength=classes) - expected) ** 2 / expected).sum()
    assert chi_square < 35  # 9 degrees of freedom: p = 6e-5
    z = noise(range(count), (1, 1, 4)).reshape(count, 4)
    means = np.stack([z[labels == label].mean(axis=0) for label in range(classes)])
    assert np.abs(means).max() < 4.5 / np.sqrt(expected)


def test_latents_are_fresh_float32_of_the_shape_that_was_asked_for() -> None:
    first, second = noise([5, 5], (2, 3, 4)), noise([], (2, 3, 4))
    assert first.dtype == np.float32
    assert first.shape == (2, 2, 3, 4)
    assert second.shape == (0, 2, 3, 4)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("7", [7]), ("0-3", [0, 1, 2, 3]), ("1, 5,10-12", [1, 5, 10, 11, 12]), ("4-4", [4]), (f"{LAST}", [LAST])],
)
def test_seeds_are_read(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "seeds '' cannot be read"),
        ("-1", "cannot be read"),
        ("1.5", "cannot be read"),
        ("all", "cannot be read"),
        ("3-", "cannot be read"),
        ("1-2-3", "cannot be read"),
        ("9" * 5000, "cannot be read"),
        ("5-3", "range 5-3 is empty; put the smaller seed first"),
        (str(2**63), "seed 9223372036854775808 is not an integer in"),
        (f"0-{2**63}", "is not an integer in"),
        ("0-10000000", "more than 10000000; give fewer seeds"),
        ("0-6000000,0-6000000", "more than 10000000"),
    ],
)
def test_wrong_seeds_are_refused(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        parse_seeds(text)
    assert len(str(caught.value)) < 200
    assert caught.value.param == "seeds"


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", True, None])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(RequestError, match="is not an integer in"):
        checked_seeds([0, seed])  # type: ignore[list-item]
