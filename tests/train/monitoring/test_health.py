"""Warnings about a run: every symptom on a sick and a healthy curve, when it is told, and what a resumed run remembers."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uni_instruct.train.monitoring.health import DERIVED_METRICS, SETTLING, SYMPTOMS, WINDOW, DerivedMetric, Health

PATIENCE = 3
CALM = [1.0, 1.2, 0.9, 1.1, 1.0] * 4
TIMID = [0.01] * 4  # the first lines of a run


@dataclass(frozen=True)
class Curves:
    """A metric's values, line by line: `sick` ends sick for PATIENCE lines, `healthy` comes as close as a good run may."""

    metric: str
    sick: Sequence[float]
    healthy: Sequence[float]
    said: str


CURVES = {
    "collapse": Curves("generator/diversity", [1, 0.8, 0.49, 0.2, 0.06], [0.51, 0.5, 0.9, 1, 1.1, 3], "vary 0.06 times"),
    "discriminator won": Curves("discriminator/accuracy", [0.6, 0.98, 1, 0.99], [0.97, 0.5, 0.52, 0.5, 0.5], "right on 99.0%"),
    "ratio at the clamp": Curves("ratio/clamped", [0, 0.11, 0.3, 0.5], [0, 0.1, 0.1, 0.1, 0.1], "50% of the log-ratios"),
    "few samples count": Curves(
        "ratio/effective_sample_size", [1, 0.09, 0.05, 0.02], [0.1, 0.1, 0.1, 1, 1], "2.0% of the batch"
    ),
    # At first the fake score is the teacher's copy; the distance that it then takes is no sickness, nor is a single bad line.
    "fake score lags": Curves(
        "generator/score_distance", [*CALM, 2.6, 4, 6, 9], [1e-6, 1e-3, *CALM, 2.6, 9, 2, 9, 2], "10.0 times"
    ),
    "teacher diverges": Curves("teacher/loss", [*CALM, 3, 4, 5.4], [9, 5, 3, 2, 1.5, *CALM, 2.7, 2.7, 2.7], "6.0 times"),
    "generator explodes": Curves("generator/gradient_norm", [*CALM, 21, 50, 100], [*TIMID, *CALM, 19, 19, 19, 19], "100 times"),
    "critic explodes": Curves("critic/gradient_norm", [*CALM, 21, 50, 100], [*TIMID, *CALM, 19, 19, 19, 19], "100 times"),
    "steps skipped": Curves("skipped_steps", [0, 0, 1, 3, 9], [7, 7, 8, 9, 9, 10, 11, 11], "6 steps were skipped"),
}


def warnings_of(metric: str, values: Sequence[float], health: Health | None = None) -> list[tuple[int, str]]:
    """(line, warning), lines counted from 0."""
    health = health or Health(PATIENCE)
    return [(line, warning) for line, value in enumerate(values) for warning in health.examine({metric: value})]


def test_every_symptom_has_its_curves() -> None:
    assert CURVES.keys() == SYMPTOMS.keys()
    assert {c.metric for c in DERIVED_METRICS.values()} <= {curves.metric for curves in CURVES.values()}


@pytest.mark.parametrize("name", CURVES)
def test_a_sick_curve_is_named_with_its_value_and_remedy(name: str) -> None:
    curves, symptom = CURVES[name], SYMPTOMS[name]
    assert warnings_of(curves.metric, curves.sick[:-1]) == []
    ((line, warning),) = warnings_of(curves.metric, curves.sick)
    assert line == len(curves.sick) - 1
    assert curves.said in warning
    assert warning.endswith(f"; {symptom.remedy}")


@pytest.mark.parametrize("name", CURVES)
def test_a_healthy_curve_is_silent(name: str) -> None:
    assert warnings_of(CURVES[name].metric, CURVES[name].healthy) == []


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_a_symptom_is_told_once_and_again_after_it_was_gone_for_as_long(patience: int) -> None:
    health, sick, well = Health(patience), [0.1], [1.0]
    metric = "generator/diversity"
    course = sick * (patience + 4) + well * (patience - 1) + sick * (patience + 4)  # gone too shortly: one illness
    assert [line for line, _ in warnings_of(metric, course, health)] == [patience - 1]
    again = well * patience + sick * (patience + 4)
    assert [line for line, _ in warnings_of(metric, again, health)] == [2 * patience - 1]


def test_symptoms_are_counted_each_on_its_own_and_told_together() -> None:
    line = {"generator/diversity": 0.1, "discriminator/accuracy": 1.0, "ratio/clamped": 0.0, "teacher/loss": 1.0}
    health = Health(patience=2)
    assert health.examine(line) == []
    assert [warning.split()[0] for warning in health.examine(line)] == ["generated", "the"]


def test_a_line_without_the_metric_neither_cures_nor_counts() -> None:
    health = Health(patience=2)
    lines = [{"generator/diversity": 0.1}, {}, {"teacher/loss": 1.0}, {"generator/diversity": 0.1}]
    assert [len(health.examine(line)) for line in lines] == [0, 0, 0, 1]


def test_a_gradient_is_compared_with_the_recent_past_only() -> None:
    """What was normal longer than the window ago is forgotten, and what lasts longer than half of it is the new normal."""
    shrunk = [100.0] * WINDOW + [1.0] * (WINDOW // 2 + 1)
    assert [line for line, _ in warnings_of("critic/gradient_norm", [*shrunk, 30.0, 30.0, 30.0])] == [len(shrunk) + 2]
    health = Health(PATIENCE)
    warnings_of("critic/gradient_norm", [1.0] * WINDOW + [30.0] * (WINDOW // 2 + PATIENCE), health)
    assert warnings_of("critic/gradient_norm", [30.0] * WINDOW, health) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_value_that_is_no_number_does_not_blind_the_comparisons(bad: float) -> None:
    curve = [*CALM, bad, *CALM, 9.0, 9.0, 9.0]
    assert [line for line, _ in warnings_of("generator/score_distance", curve)] == [len(curve) - 1]


@pytest.mark.parametrize("comparison", DERIVED_METRICS.values(), ids=DERIVED_METRICS)
def test_nothing_is_divided_by_a_past_of_zeros(comparison: DerivedMetric) -> None:
    assert warnings_of(comparison.metric, [0.0] * 2 * SETTLING + [1.0, 1.0]) == []


LINES = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "generator/diversity": st.sampled_from([0.1, 1.0]),
            "generator/score_distance": st.sampled_from([0.5, 1.0, 4.0]),
            "critic/gradient_norm": st.sampled_from([1.0, 30.0]),
            "skipped_steps": st.sampled_from([0.0, 1.0, 2.0, 3.0]),
        },
    ),
    max_size=40,
)


@given(lines=LINES, data=st.data())
def test_a_resumed_run_warns_as_the_uninterrupted_one(lines: list[dict[str, float]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(lines)))
    whole = Health(patience=2)
    expected = [whole.examine(line) for line in lines]

    killed, resumed = Health(patience=2), Health(patience=2)
    before = [killed.examine(line) for line in lines[:cut]]
    state = killed.state_dict()
    for line in lines[cut:]:
        killed.examine(line)  # what happens after the state was taken must not reach it
    resumed.load_state_dict(through_a_file(state))
    assert before + [resumed.examine(line) for line in lines[cut:]] == expected
    assert resumed.state_dict() == whole.state_dict()


def test_memory_is_what_makes_a_resumed_run_warn() -> None:
    """The guard of the test above: without its state the second half of these curves would be silent."""
    for name in ("fake score lags", "critic explodes"):
        curves = CURVES[name]
        assert len(curves.sick) > SETTLING + PATIENCE
        first = Health(PATIENCE)
        assert warnings_of(curves.metric, curves.sick[:-2], first) == []
        resumed = Health(PATIENCE)
        resumed.load_state_dict(through_a_file(first.state_dict()))
        assert len(warnings_of(curves.metric, curves.sick[-2:], resumed)) == 1
        assert warnings_of(curves.metric, curves.sick[-2:]) == []


def through_a_file(state: dict[str, object]) -> dict[str, object]:
    """As a run keeps it: a file that is read without running code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, object] = torch.load(buffer, weights_only=True)
    return loaded
