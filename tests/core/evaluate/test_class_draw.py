"""Classes by name and by id, and how often each is drawn: all alike, or as in the data."""

import dataclasses
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders.bundles import random_bundle
from builders.data_sets import arrays_dataset, png, zip_of
from uni_instruct.bundle import Bundle
from uni_instruct.data import Dataset, write_zip
from uni_instruct.errors import RequestError
from uni_instruct.evaluate.class_draw import DATA, UNIFORM, class_counts, draw_classes
from uni_instruct.generate import resolve_class_ids
from uni_instruct.noise import random_class_ids
from uni_instruct.spec import ModelSpec

Cli = Callable[..., tuple[int, str, str]]
ACCENT = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"


def spec_of(*names: str) -> ModelSpec:
    return ModelSpec(name="x", noise_shape=(1, 8, 8), num_classes=len(names), class_names=names)


def data_of(counts: list[int], names: tuple[str, ...] = ()) -> Dataset:
    labels = np.repeat(np.arange(len(counts)), counts)
    levels = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 1), dtype=np.uint8)
    dataset = arrays_dataset(levels, labels, len(counts))
    return dataclasses.replace(dataset, class_names=names) if names else dataset


def test_a_name_wins_over_an_id() -> None:
    numbered = spec_of("1", "2", "3")
    assert [numbered.class_id(label) for label in ("1", "2", "3", 0, 1, 2)] == [0, 1, 2, 0, 1, 2]
    with pytest.raises(RequestError, match=r"no class is named 0, .* are numbers; give a name, such as 1 for the class with"):
        numbered.class_id("0")
    assert [spec_of("1", "cat").class_id(label) for label in ("1", "0", "cat")] == [0, 0, 1]


def test_an_ambiguous_name_is_refused_and_an_id_is_not() -> None:
    twins = spec_of("cat", "dog", "cat")
    with pytest.raises(RequestError, match="2 classes are named cat; give an id: 0, 2"):
        twins.class_id("cat")
    assert [twins.class_id(label) for label in ("dog", "0", "2")] == [1, 0, 2]


def test_accents_may_be_written_apart_or_not() -> None:
    apart = unicodedata.normalize("NFD", ACCENT)
    assert apart != ACCENT
    for stored in (apart, ACCENT):
        assert [spec_of("tea", stored).class_id(asked) for asked in (apart, ACCENT)] == [1, 1]
        assert data_of([1, 1], ("tea", stored)).class_names == ("tea", ACCENT)
    assert class_counts(spec_of(apart, "tea"), data_of([2, 3], ("tea", ACCENT))).tolist() == [3, 2]  # type: ignore[union-attr]


@pytest.mark.parametrize(("label", "near"), [("tomcat", "cat"), ("DOGG", "dog"), ("red fx", "red fox")])
def test_a_refusal_names_the_nearest_classes(label: str, near: str) -> None:
    with pytest.raises(RequestError, match=rf"nor an id in 0\.\.2; the nearest are {near}; 'uni-instruct inspect' lists"):
        spec_of("cat", "dog", "red fox").class_id(label)


def test_shares_are_those_asked_for_and_a_seed_keeps_its_class() -> None:
    seeds, shares = range(20_000), np.array([1, 0, 6, 3])
    ids = random_class_ids(seeds, 4, shares)
    # Four standard deviations of a binomial share of 20,000 draws are below 0.0142.
    assert np.abs(np.bincount(ids, minlength=4) / len(ids) - shares / 10).max() < 0.0142
    assert random_class_ids([7, 19_999, 3], 4, shares).tolist() == ids[[7, 19_999, 3]].tolist()
    assert np.array_equal(random_class_ids(range(99), 4, 5 * shares), ids[:99])  # they need not sum to anything


def test_classes_are_drawn_as_in_unbalanced_data_and_else_alike() -> None:
    spec, seeds = spec_of("a", "b", "c"), range(3000)
    names = ("c", "a", "b")  # in another order than the model's: shares go by name
    drawn = draw_classes(spec, seeds, data_of([20, 178, 100], names))
    assert drawn.class_ids is not None
    shares = np.bincount(drawn.class_ids, minlength=3) / 3000
    assert np.abs(shares - np.array([178, 100, 20]) / 298).max() < 0.04
    assert (drawn.how, drawn.note) == (DATA, "classes are drawn with the frequencies of the reference (20 to 178 images each)")
    uniform = resolve_class_ids(spec, seeds)
    for how, counts in ((UNIFORM, [20, 178, 100]), (None, [100, 100, 149])):
        drawn = draw_classes(spec, seeds, data_of(counts, names), how)
        assert np.array_equal(drawn.class_ids, uniform)  # type: ignore[arg-type]
        assert (drawn.how, drawn.note) == (UNIFORM, "")
    assert draw_classes(spec, seeds, data_of([5, 1], ("a", "b"))).how == UNIFORM  # it lacks a class
    with pytest.raises(RequestError, match=r"has no frequencies for the generator's classes; .*--classes uniform"):
        draw_classes(spec, seeds, data_of([5, 1], ("a", "b")), DATA)
    none = dataclasses.replace(spec, num_classes=0, class_names=())
    assert draw_classes(none, seeds, None) == (None, "", "")
    with pytest.raises(RequestError, match="has no classes; leave --classes out"):
        draw_classes(none, seeds, None, UNIFORM)


@pytest.mark.usefixtures("quick_classifier")
def test_evaluate_says_how_classes_were_drawn(tmp_path: Path, tiny_bundle: Bundle, cli: Cli) -> None:
    counts = [60, 10, 10, 10, 10, 10, 10, 10, 10, 10]
    write_zip(data_of(counts), tmp_path / "unbalanced.zip")
    command = ["evaluate", tiny_bundle.path, "--reference", tmp_path / "unbalanced.zip", "--samples", "50", "--metrics", "fd"]
    code, output, errors = cli(*command, "--extractor", "classifier", "--json")
    assert code == 0, errors
    facts = json.loads(output)
    assert (facts["classes"], facts["notes"][0]) == (
        DATA,
        "classes are drawn with the frequencies of the reference (10 to 60 images each)",
    )
    code, output, _ = cli(*command, "--extractor", "classifier", "--classes", "uniform")
    assert (code, "seeds 0-49, classes uniform" in output) == (0, True)
    alike = next(line for line in output.splitlines() if line.startswith("generator FD"))
    assert float(alike.split()[-1]) != pytest.approx(next(iter(facts["scores"]["generator"]["values"].values())), rel=1e-3)


@pytest.mark.usefixtures("quick_classifier")
def test_images_in_a_zip_of_class_folders_keep_their_class_accuracy(tmp_path: Path, cli: Cli) -> None:
    rng = np.random.default_rng(1)
    files = {f"set/{n % 2}/{n}.png": png(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for n in range(60)}
    path = zip_of(tmp_path / "x.zip", files)
    code, output, errors = cli("evaluate", path, "--reference", path, "--json", "--extractor", "classifier")
    assert code == 0, errors
    assert "class_accuracy" in json.loads(output)["scores"]["images"]["values"]
    bare = zip_of(
        tmp_path / "bare.zip", {name.rpartition("/")[2]: content for name, content in files.items()} | {"a.csv": b"x"}
    )
    code, output, _ = cli("evaluate", bare, "--reference", path, "--extractor", "classifier")
    assert (code, "images class_accuracy:" in output) == (0, False)
    assert "note: no class_accuracy: the images have no classes; 1 file (a.csv) skipped: not images" in output
    # The reference's are named: else they are read as the images' own.
    more = zip_of(tmp_path / "more.zip", files | {"set/a.csv": b"x"})
    code, output, _ = cli("evaluate", path, "--reference", more, "--extractor", "classifier")
    assert (code, "note: more: 1 file (set/a.csv) skipped: not images\n" in output) == (0, True), output


def test_generate_draws_classes_as_in_the_data_of_the_training(tmp_path: Path, cli: Cli) -> None:
    bundle = random_bundle(tmp_path / "b", seed=1)
    command = ["generate", bundle.path, "--seeds", "0-199", "--out"]
    code, _, errors = cli(*command, tmp_path / "no.npz", "--classes", "data")
    assert (code, "does not say how many images of each class it was trained on; use --classes uniform" in errors) == (2, True)
    counts = [90, 10, *[0] * 8]
    spec = dataclasses.replace(bundle.spec, provenance={"class_counts": counts})
    Bundle.write(tmp_path / "b", spec, bundle.weights(), card="# tiny\n")
    code, output, errors = cli(*command, tmp_path / "x.npz", "--classes", "data")
    assert (code, output.rstrip().endswith("classes data")) == (0, True), errors
    with np.load(tmp_path / "x.npz") as made:
        assert np.bincount(made["class_ids"], minlength=10)[2:].sum() == 0
        assert np.array_equal(made["class_ids"], random_class_ids(range(200), 10, np.array(counts)))
    code, _, errors = cli(*command, tmp_path / "y.npz", "--classes", "data", "--class", "1")
    assert (
        code,
        "--classes draws the classes from the seeds, but --class or --by-class gives them; leave one out" in errors,
    ) == (2, True)
    facts = json.loads(cli(*command, tmp_path / "z.npz", "--json")[1])
    assert facts["classes"] == UNIFORM
