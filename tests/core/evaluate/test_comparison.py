"""`compare`: intervals against closed forms and against simulated trainings; what cannot be compared is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from uni_instruct.evaluate.comparison import Trained, compare_recipes, compare_weights, student_quantile

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("freedom", [1, 1.5, 2, 4, 7.3, 30, 500])
def test_quantiles_are_scipys(freedom: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for probability in (0.6, 0.9, 0.975, 0.995):
        assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-4)


def test_the_interval_of_weights_is_welchs() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = (1.02, 0.98, 1.01), (1.30, 1.24, 1.31)
    found = compare_weights("FID", [Trained(a)], [Trained(b)])
    truth = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert found.interval == pytest.approx((truth.low, truth.high), rel=1e-4)
    assert found.verdict == "better"
    assert compare_weights("FID", [Trained(b)], [Trained(a)]).verdict == "worse"
    assert compare_weights("recall", [Trained(b)], [Trained(a)]).verdict == "better"


def test_one_training_tells_weights_apart_and_not_recipes() -> None:
    a, b = [Trained((1.00, 0.96, 1.04))], [Trained((1.15, 1.11, 1.19))]
    assert compare_weights("FID", a, b).verdict == "better"
    recipes = compare_recipes("FID", a, b)
    assert recipes.verdict == "inconclusive"
    assert "3.2 times" in recipes.basis
    several = [[Trained((mean - 0.01, mean + 0.01)) for mean in means] for means in ((1.0, 1.02, 0.98), (1.5, 1.47, 1.53))]
    assert compare_recipes("FID", *several).verdict == "better"
    assert compare_recipes("FID", [Trained((1.0,))], b).verdict == "inconclusive"


def test_recipes_that_are_the_same_are_told_apart_as_rarely_as_said() -> None:
    """Four trainings of either side, drawn from one distribution: at most 5 % of the verdicts are wrong."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        sides = [[Trained(tuple(rng.normal(rng.normal(1, 0.05), 0.015, 3))) for _ in range(4)] for _ in range(2)]
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


def test_what_cannot_be_compared_is_refused(tmp_path: Path, cli: Cli) -> None:
    a = result(tmp_path / "a.json", "a", [1.0, 1.1])
    other = result(tmp_path / "b.json", "b", [1.0, 1.1], extractor={"sha256": "f"})
    classes = result(tmp_path / "c.json", "c", [1.0, 1.1], classes="data")
    (tmp_path / "d.json").write_text("[]")
    wrong = {
        (a, other): "differ in their extractor: e and f; evaluate both alike",
        (a, classes): "differ in their draw of classes: uniform and data",
        (a, tmp_path / "none.json"): "there is no result or bundle",
        (a, tmp_path / "d.json"): "is no result of a generator; write one: uni-instruct evaluate BUNDLE",
        (a, f"{a},{a}"): "has the same weights twice",
        (a, a, "--sets", "3"): "--sets is for bundles, and results were given; leave it out",
        (a, a, "--ray"): "--ray is for bundles, and results were given; leave it out",
        (a, a, "--metric", "IS"): "has no IS; choose one of FD(x), recall",
    }
    for arguments, message in wrong.items():
        code, _, err = cli("compare", *arguments)
        assert (code, message in err) == (2, True), err
