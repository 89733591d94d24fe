"""What goes into a generator is checked once and alike: the same error, or the same images, whatever the engine."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builders.bundles import random_bundle
from uni_instruct.bundle import Bundle
from uni_instruct.class_mixture import ClassMixture
from uni_instruct.engine import Engine, available_engines, open_engine
from uni_instruct.errors import RequestError
from uni_instruct.generate import generate_images, input_batches, mix_classes, resolve_class_ids
from uni_instruct.noise import draw_inputs, noise, random_class_ids, round_robin_class_ids

SEEDS = [7, 8, 9]


@pytest.fixture(scope="module")
def engines(exported_bundle: Bundle) -> list[Engine]:
    """One of every runtime there is: ten classes, 8x8 grey."""
    opened = [open_engine(exported_bundle, engine_id) for engine_id in available_engines(exported_bundle)]
    assert len(opened) > 1
    return opened


def z(count: int = 3) -> np.ndarray:
    return noise(range(count), (1, 8, 8))


IDS = np.array([1, 2, 3])
# Calls of an engine: noise and class ids -> the error.
WRONG_CALLS: dict[str, tuple[Any, Any, str]] = {
    "no class": (z(), None, "generator 'tiny' has 10 classes, but no class ids were given; give one for each image"),
    "class too large": (
        z(),
        [1, 2, 10],
        "class 10 is outside 0..9; the nearest are 1, 0; 'uni-instruct inspect' lists the classes",
    ),
    "class negative": (z(), np.array([1, -1, 2]), "class -1 is outside 0..9"),
    "too few classes": (z(), [1], "class ids are int64 [1], not integers [3]; give an id for each image"),
    "one class for all": (z(), 4, "class ids are int64 [], not integers [3]"),
    "classes in a column": (z(), IDS[:, None], "class ids are int64 [3, 1], not integers [3]"),
    "classes of floats": (z(), [1.0, 2.0, 3.0], "class ids are float64 [3], not integers [3]"),
    "classes of truths": (z(), [True, False, True], "class ids are bool [3], not integers [3]"),
    "classes by name": (z(), ["1", "2", "3"], "class ids are <U1 [3], not integers [3]"),
    "ragged classes": (z(), [[1], [2, 3]], "class ids cannot be read as an array"),
    "noise of 64 bits": (z().astype(np.float64), IDS, "noise is float64, not float32; give noise.astype('float32')"),
    "noise of 16 bits": (z().astype(np.float16), IDS, "noise is float16, not float32"),
    "noise of integers": (z().astype(np.int64), IDS, "noise is int64, not float32"),
    "noise in the other byte order": (z().astype(">f4"), IDS, "noise is >f4, not float32"),
    "noise as a list": (z().tolist(), IDS, "noise is float64, not float32"),
    "noise of one image": (z()[0], [1], "noise has shape [1, 8, 8], not [B, 1, 8, 8] with B >= 1"),
    "noise as pictures lie": (z().transpose(0, 2, 3, 1), IDS, "noise has shape [3, 8, 8, 1], not [B, 1, 8, 8]"),
    "noise of another size": (noise(SEEDS, (1, 4, 4)), IDS, "noise has shape [3, 1, 4, 4], not [B, 1, 8, 8]"),
    "no noise": (z()[:0], [], "noise has shape [0, 1, 8, 8], not [B, 1, 8, 8] with B >= 1"),
    "noise with a gradient": (torch.zeros(3, 1, 8, 8, requires_grad=True), IDS, "noise cannot be read as an array"),
}


@pytest.mark.parametrize("wrong", WRONG_CALLS)
def test_every_engine_refuses_a_wrong_call_alike(wrong: str, engines: list[Engine]) -> None:
    values, class_ids, message = WRONG_CALLS[wrong]
    for engine in engines:
        for call in (engine, engine.outputs):
            with pytest.raises(RequestError) as refused:
                call(values, class_ids)
            assert message in str(refused.value)


# What means the same three images as float32 noise and int64 ids do.
RIGHT_CALLS: dict[str, Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]] = {
    "a list of ids": lambda z, ids: (z, ids.tolist()),
    "a tuple of ids": lambda z, ids: (z, tuple(ids.tolist())),
    "ids of 8 bits": lambda z, ids: (z, ids.astype(np.uint8)),
    "ids as a tensor": lambda z, ids: (z, torch.from_numpy(ids)),
    "noise as a tensor": lambda z, ids: (torch.from_numpy(z), ids),
    "noise that lies otherwise": lambda z, ids: (np.asfortranarray(z), ids),
    "noise backwards, twice": lambda z, ids: (z[::-1].copy()[::-1], ids),
    "noise and ids that are read only": lambda z, ids: (frozen(z), frozen(ids)),
}


def frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("right", RIGHT_CALLS)
@pytest.mark.filterwarnings("error")
def test_every_engine_takes_what_means_the_same(right: str, engines: list[Engine]) -> None:
    for engine in engines:
        np.testing.assert_array_equal(engine(*RIGHT_CALLS[right](z(), IDS)), engine(z(), IDS))


# Requests by seeds and classes, as `generate_images` takes them -> the error.
WRONG_REQUESTS: dict[str, tuple[Any, Any, str]] = {
    "seed negative": ([1, -1], None, "seed -1 is not an integer in [0, 2**63)"),
    "seed too large": ([2**63], None, "seed 9223372036854775808 is not an integer"),
    "seed a fraction": ([1.0], None, "seed 1.0 is not an integer"),
    "seed a truth": ([True], None, "seed True is not an integer"),
    "seeds of floats": (np.array([1.0, 2.0]), None, "seed 1.0 is not an integer"),
    "seeds in a column": (np.array([[1], [2]]), None, "seed [1] is not an integer"),
    "seeds as text": ("0-63", None, "seeds '0-63' are not a list; give integers, such as [7, 8] or range(64)"),
    "one seed": (7, None, "seeds '7' are not a list"),
    "a set of seeds": ({1, 2}, None, "seeds '{1, 2}' are not a list"),
    "a range that ends outside": (range(2**63, 2**63 + 1), None, "seed 9223372036854775808 is not an integer"),
    "a range that begins outside": (range(-1, 3), None, "seed -1 is not an integer"),
    "class unknown": (SEEDS, "cat", "class cat is neither a class name nor an id in 0..9"),
    "class too large": (SEEDS, 10, "class 10 is outside 0..9"),
    "class too large, of an array": (SEEDS, np.array([1, 2, 10]), "class 10 is outside 0..9"),
    "class negative": (SEEDS, [-1], "class -1 is outside 0..9"),
    "class a fraction": (SEEDS, [3.0], "class 3.0 is neither a name nor an id; 'uni-instruct inspect' lists the classes"),
    "class a fraction, of an array": (SEEDS, np.array([3.0]), "class 3.0 is neither a name nor an id"),
    "class a truth": (SEEDS, True, "class True is neither a class name nor an id in 0..9"),
    "classes too few": (SEEDS, [1, 2], "2 classes were given for 3 seeds; give one class, or one for each seed"),
    "classes in a column": (SEEDS, IDS[:, None], "class [1] is neither a name nor an id"),
    "classes as a set": (SEEDS, {1, 2}, "classes '{1, 2}' are not a list"),
}


@pytest.mark.parametrize("wrong", WRONG_REQUESTS)
def test_a_wrong_request_is_refused_before_anything_is_made(wrong: str, engines: list[Engine]) -> None:
    seeds, classes, message = WRONG_REQUESTS[wrong]
    for engine in engines:
        with pytest.raises(RequestError) as refused:
            generate_images(engine, seeds, classes)
        assert message in str(refused.value)
    with pytest.raises(RequestError):
        input_batches(engines[0].spec, seeds, classes)  # and not when the first batch is drawn


@pytest.mark.parametrize("batch", [0, -1, 2.0, None, True])
def test_what_is_no_batch_size_is_refused(batch: Any, engines: list[Engine]) -> None:
    with pytest.raises(RequestError, match=r"batch .* is not a positive integer"):
        generate_images(engines[0], SEEDS, batch=batch)


@pytest.mark.parametrize(
    "classes",
    [3, "3", [3], ["3"], [3, 3, 3], ["3", 3, "3"], (3,), np.int64(3), np.array(3), np.array([3, 3, 3]), np.array(["3"])],
    ids=repr,
)
def test_a_class_may_be_said_in_many_ways(classes: Any, engines: list[Engine]) -> None:
    for engine in engines:
        np.testing.assert_array_equal(generate_images(engine, SEEDS, classes), engine(noise(SEEDS, (1, 8, 8)), [3, 3, 3]))


@pytest.mark.parametrize("seeds", [SEEDS, tuple(SEEDS), range(7, 10), np.array(SEEDS), np.array(SEEDS, np.uint64)], ids=repr)
def test_seeds_may_be_any_sequence(seeds: Any, engines: list[Engine]) -> None:
    """Without a class each seed draws its own, with every engine."""
    for engine in engines:
        expected = engine(noise(SEEDS, (1, 8, 8)), random_class_ids(SEEDS, 10))
        np.testing.assert_array_equal(generate_images(engine, seeds), expected)


def test_generators_without_classes_take_none(tmp_path: Path) -> None:
    engine = open_engine(random_bundle(tmp_path / "plain", seed=4, num_classes=0))
    np.testing.assert_array_equal(generate_images(engine, SEEDS), engine(noise(SEEDS, (1, 8, 8)), None))
    for call in (lambda: engine(z(), np.zeros(3, np.int64)), lambda: generate_images(engine, SEEDS, 0)):
        with pytest.raises(RequestError, match="generator 'tiny' has no classes; leave the class out"):
            call()


def test_padding_repeats_the_last_row(tiny_bundle: Bundle) -> None:
    inputs = draw_inputs(tiny_bundle.spec, SEEDS, IDS)
    padded = inputs.padded(5)
    np.testing.assert_array_equal(padded.noise, noise([7, 8, 9, 9, 9], (1, 8, 8)))
    np.testing.assert_array_equal(padded.class_ids, [1, 2, 3, 3, 3])  # type: ignore[arg-type]
    assert inputs._replace(class_ids=None).padded(4).class_ids is None


def test_classes_in_turn_see_every_class(tiny_bundle: Bundle) -> None:
    spec = tiny_bundle.spec
    assert round_robin_class_ids(spec, 12).tolist() == [*range(10), 0, 1]  # type: ignore[union-attr]
    assert round_robin_class_ids(dataclasses.replace(spec, num_classes=0, class_names=()), 12) is None


def test_a_range_of_millions_is_not_walked(tiny_bundle: Bundle) -> None:
    spec = dataclasses.replace(tiny_bundle.spec, num_classes=0, class_names=())
    inputs = next(input_batches(spec, range(2**62, 2**63), batch=2))
    np.testing.assert_array_equal(inputs.noise, noise([2**62, 2**62 + 1], (1, 8, 8)))
    assert resolve_class_ids(spec, range(2**62)) is None


def test_mixtures_of_names_and_ids_go_through_batches_and_padding(tiny_bundle: Bundle) -> None:
    spec = dataclasses.replace(tiny_bundle.spec, num_classes=3, class_names=("ape", "bee", "cat"))
    mixture = mix_classes(spec, "bee", ["ape", "cat", 1, "cat", "ape"], [0, 0.25, 0.5, 0.75, 1])
    batches = list(input_batches(spec, range(5), mixture, batch=2))
    assert [len(batch.noise) for batch in batches] == [2, 2, 1]
    padded = batches[-1].padded(2).class_ids
    assert isinstance(padded, ClassMixture)
    parts = [*(batch.class_ids for batch in batches[:2]), padded]
    for name, expected in (
        ("class_ids", [1, 1, 1, 1, 1, 1]),
        ("other_ids", [0, 2, 1, 2, 0, 0]),
        ("share", [0, 0.25, 0.5, 0.75, 1, 1]),
    ):
        found = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == (np.float32 if name == "share" else np.int64)
    assert mixture[:1].simplified().tolist() == [1]  # type: ignore[union-attr]
    assert mixture.simplified() is mixture
    with pytest.raises(RequestError, match="5 classes were given for 4 seeds; give one class, or one for each seed"):
        input_batches(spec, range(4), mixture)


def test_one_mixture_is_for_all_seeds_as_one_class_is(tiny_bundle: Bundle) -> None:
    engine = open_engine(tiny_bundle, "torch")
    one, each = mix_classes(engine.spec, "3", "8", 0.5), mix_classes(engine.spec, "3", "8", [0.5] * 3)
    np.testing.assert_array_equal(generate_images(engine, [7, 8, 9], one), generate_images(engine, [7, 8, 9], each))


@pytest.mark.parametrize("share", [[[0.5], [0.2, 0.3]], [[0.5, 0.2]], "half", [1.5], np.nan])
def test_shares_that_are_none_are_refused(share: object) -> None:
    spec = Bundle.open("digits").spec
    with pytest.raises(RequestError) as caught:
        mix_classes(spec, 3, 8, share)  # type: ignore[arg-type]
    assert caught.value.param == "share"


def test_a_mixture_is_no_matter_of_its_batch_nor_of_who_shares_it() -> None:
    engine = open_engine("digits", "onnx")
    mixture = mix_classes(engine.spec, [1, 2, 3, 4], 8, [0, 0.3, 0.6, 1])
    together = generate_images(engine, range(4), mixture)
    for index in range(4):
        np.testing.assert_array_equal(generate_images(engine, [index], mixture[index : index + 1])[0], together[index])
    np.testing.assert_array_equal(together[[0, 3]], generate_images(engine, [0, 3], [1, 8]))


def test_a_teacher_mixes_classes_over_all_of_its_steps(tiny_teacher: Bundle) -> None:
    engine = open_engine(tiny_teacher, "torch")
    assert engine.mixes_classes
    z = noise([7] * 3, engine.spec.noise_shape)
    images = engine.outputs(z, mix_classes(engine.spec, 1, 3, [0, 0.5, 1])).images
    ends = engine.outputs(z, np.array([1, 1, 3])).images
    np.testing.assert_array_equal(images[[0, 2]], ends[[0, 2]])
    assert np.abs(images[1] - images[[0, 2]]).max(axis=(1, 2, 3)).min() > 1e-3


def test_a_mixture_needs_classes(tmp_path: Path) -> None:
    engine = open_engine(random_bundle(tmp_path / "plain", seed=4, num_classes=0))
    assert not engine.mixes_classes
    with pytest.raises(RequestError, match="has no classes; leave the class out"):
        mix_classes(engine.spec, 0, 1, [0.5] * 3)
    with pytest.raises(RequestError, match="has no classes; leave the class out"):
        engine(z(), ClassMixture.of(np.zeros(3, np.int64)))
