"""`compare`: intervals against closed forms and against simulated trainings; what cannot be compared is refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.errors import FileFormatError
from uni_instruct.evaluate.comparison import TrainingScores, compare_recipes, compare_weights, student_quantile
from uni_instruct.export.card import _scores
from uni_instruct.export.publish import read_scores

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 4, 7.3, 30, 500])
def test_quantiles_are_scipys(freedom: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for probability in (0.6, 0.9, 0.975, 0.995):
        assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-4)


def test_the_interval_of_weights_is_welchs() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = (1.02, 0.98, 1.01), (1.30, 1.24, 1.31)
    found = compare_weights("FID", [TrainingScores(a)], [TrainingScores(b)])
    truth = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert found.interval == pytest.approx((truth.low, truth.high), rel=1e-4)
    assert found.verdict == "better"
    assert compare_weights("FID", [TrainingScores(b)], [TrainingScores(a)]).verdict == "worse"
    assert compare_weights("recall", [TrainingScores(b)], [TrainingScores(a)]).verdict == "better"


def test_one_training_tells_weights_apart_and_not_recipes() -> None:
    a, b = [TrainingScores((1.00, 0.96, 1.04))], [TrainingScores((1.15, 1.11, 1.19))]
    assert compare_weights("FID", a, b).verdict == "better"
    recipes = compare_recipes("FID", a, b)
    assert recipes.verdict == "inconclusive"
    assert "3.2 times" in recipes.basis
    several = [
        [TrainingScores((mean - 0.01, mean + 0.01)) for mean in means] for means in ((1.0, 1.02, 0.98), (1.5, 1.47, 1.53))
    ]
    assert compare_recipes("FID", *several).verdict == "better"
    assert compare_recipes("FID", [TrainingScores((1.0,))], b).verdict == "inconclusive"


def test_recipes_that_are_the_same_are_told_apart_as_rarely_as_said() -> None:
    """Four trainings of either side, drawn from one distribution: at most 5 % of the verdicts are wrong."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        sides = [[TrainingScores(tuple(rng.normal(rng.normal(1, 0.05), 0.015, 3))) for _ in range(4)] for _ in range(2)]
        wrong += compare_recipes("FID", *sides).verdict != "inconclusive"
    assert wrong <= 32  # 20 expected, deviation 4.4


def result(path: Path, weights: str, values: list[float], **other: Any) -> Path:
    sets = [{"FD(x)": value, "recall": 0.5} for value in values]
    generator = {"weights_sha256": weights, "samples": 1000, "values": sets[0], "by_set": sets}
    facts = {"reference": {"name": "digits", "samples": 1797}, "extractor": {"sha256": "e"}, "classes": "uniform"}
    path.write_text(json.dumps(facts | {"scores": {"generator": generator}} | other))
    return path


def test_the_command_says_what_can_be_said(tmp_path: Path, cli: Cli) -> None:
    a = [result(tmp_path / f"a{i}.json", f"a{i}", [1 + i / 50, 1.01 + i / 50, 1.02 + i / 50]) for i in range(3)]
    b = [result(tmp_path / f"b{i}.json", f"b{i}", [2 + i / 50, 2.01 + i / 50, 2.02 + i / 50]) for i in range(3)]
    code, out, _ = cli("compare", ",".join(map(str, a)), ",".join(map(str, b)))
    assert code == 0
    assert "A: FD(x) 1.01, 1.03, 1.05, 3 trainings" in out
    assert "these weights: A is better (difference -1, 95% interval" in out
    assert "the recipes: A is better (difference -1, 95% interval" in out
    facts = json.loads(cli("compare", a[0], b[0], "--json")[1])
    assert facts["weights"]["verdict"] == "better"
    assert facts["a"] == pytest.approx([1.01])
    assert json.loads(cli("compare", a[0], b[0], "--metric", "pr", "--json")[1])["metric"] == "recall"
    assert json.loads(cli("compare", a[0], b[0], "--metric", "recall", "--json")[1])["weights"]["verdict"] == "inconclusive"


@pytest.mark.parametrize(("classes", "said"), [("uniform", True), ("data", False), (None, False)])
def test_a_generator_without_classes_compares_and_what_decides_is_said(
    tmp_path: Path, cli: Cli, classes: str | None, said: bool
) -> None:
    """It was refused, with a remedy that nobody could follow: there are no classes to draw alike."""
    a = result(tmp_path / "a.json", "a", [1.0, 1.1], classes=classes)
    b = result(tmp_path / "b.json", "b", [2.0, 2.1], classes=None)
    for pair in ((a, b), (b, a)):
        code, out, errors = cli("compare", *pair, "--json")
        assert code == 0, errors
        note = json.loads(out)["note"]
        assert ("fair only if the reference is balanced" in note) == said
        assert "training again changes FID" in note


def test_what_cannot_be_compared_is_refused(tmp_path: Path, cli: Cli) -> None:
    a = result(tmp_path / "a.json", "a", [1.0, 1.1])
    other = result(tmp_path / "b.json", "b", [1.0, 1.1], extractor={"sha256": "f"})
    classes = result(tmp_path / "c.json", "c", [1.0, 1.1], classes="data")
    (tmp_path / "d.json").write_text("[]")
    wrong = {
        (a, other): "differ in their extractor: e and f; evaluate both with the same --extractor",
        (a, classes): "differ in their draw of classes: uniform and data; evaluate both with the same --classes",
        (a, tmp_path / "none.json"): "there is no result or bundle",
        (
            a,
            tmp_path / "d.json",
        ): "is not a result of a generator (it is not a result); write one: uni-instruct evaluate BUNDLE",
        (a, f"{a},{a}"): "contains the same weights twice",
        (a, a, "--sets", "3"): "--sets applies to bundles only, but results were given; leave it out",
        (a, a, "--ray"): "--ray applies to bundles only, but results were given; leave it out",
        (a, a, "--metric", "IS"): "has no IS; choose one of FD(x), recall",
    }
    for arguments, message in wrong.items():
        code, _, err = cli("compare", *arguments)
        assert (code, message in err) == (2, True), err


ODD = [None, True, 10**400, "x", [], {}, [1], {"FD(x)": "1"}, {"FD(x)": True}, [{"FD(x)": 1.0}, {}]]


def places(facts: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    for key, inner in facts.items() if isinstance(facts, dict) else enumerate(facts) if isinstance(facts, list) else ():
        yield from places(inner, (*at, key))


def changed(facts: Any, at: tuple[Any, ...], value: object) -> Any:
    """A copy with another value at one place; without it, where that is LEFT_OUT."""
    if not at:
        return value
    copied, (key, *rest) = facts.copy(), at
    if value is LEFT_OUT and not rest:
        del copied[key]
    else:
        copied[key] = changed(facts[key], tuple(rest), value)
    return copied


LEFT_OUT = object()


def test_an_edited_result_is_one_line_wherever_it_is_edited(tmp_path: Path, cli: Cli) -> None:
    a, b = (result(tmp_path / f"{name}.json", name, [1.0, 1.1], seeds="0-9", sets=2) for name in "ab")
    facts, refused = json.loads(a.read_text()), 0
    for at in places(facts):
        for value in (*ODD, *[LEFT_OUT] * bool(at)):
            a.write_text(json.dumps(changed(facts, at, value)))
            code, _, err = cli("compare", a, b)
            assert code in (0, 2), (at, value, err)
            assert code == 0 or (err.count("\n") == 1 and "; " in err and len(err) < 500), err
            refused += code == 2
            with suppress(FileFormatError):  # what a card is made of is read by the same rules, and stricter
                assert _scores([read_scores(a)], "a")
    assert refused > 100


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_finite_number_is_not_compared(tmp_path: Path, cli: Cli, value: float) -> None:
    a, b = (result(tmp_path / f"{name}.json", name, [1.0, number]) for name, number in (("a", 1.1), ("b", value)))
    code, _, err = cli("compare", a, b)
    assert (code, f"has FD(x) 1.0, {value}, which cannot be compared; evaluate it with more --samples" in err) == (2, True)
    assert cli("compare", a, b, "--metric", "recall")[0] == 0


@pytest.mark.parametrize("metric", ["FD(x)", "FD", "fd", "fd(X)"])
def test_a_metric_may_be_named_without_its_extractor(tmp_path: Path, cli: Cli, metric: str) -> None:
    a, b = (result(tmp_path / f"{name}.json", name, [1.0, 1.1]) for name in "ab")
    assert json.loads(cli("compare", a, b, "--metric", metric, "--json")[1])["metric"] == "FD(x)"


@pytest.mark.parametrize("metric", ["", "beauty"])
def test_an_unknown_metric_is_told_before_anything_is_scored(tiny_bundle: Bundle, cli: Cli, metric: str) -> None:
    code, _, err = cli("compare", tiny_bundle.path, "digits", "--reference", "digits", "--metric", metric)
    assert (code, err) == (2, f"error: metric '{metric}' is unknown; choose from fd, kd, pr, is, class_accuracy\n")
