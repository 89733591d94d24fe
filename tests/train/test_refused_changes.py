"""A run that may not go on as it is asked to: each remedy, followed, is accepted."""

import re
from contextlib import suppress
from pathlib import Path

import pytest

from builders.runs import run_at
from uni_instruct.errors import RequestError
from uni_instruct.train.config import Recipe
from uni_instruct.train.recipe import load_recipe, recipe_fields
from uni_instruct.train.recipe_changes import allowed_changes


def test_a_term_that_brings_networks_is_not_told_to_be_lengthened(tmp_path: Path) -> None:
    folder, without = run_at(tmp_path / "run", generator=700), ["method=sid"]
    with pytest.raises(
        RequestError,
        match=r"contains a run with objective.adversarial_scale=0.0, which a resumed run cannot change to 0.1; leave it at 0.0",
    ):
        allowed_changes(folder, load_recipe("digits", without), load_recipe("digits", [*without, "adversarial_scale=0.1"]))


def refusal(folder: Path, base: Recipe, *changes: str) -> str:
    """Why the run does not go on with these changes; '' where it does."""
    try:
        allowed_changes(folder, base, load_recipe("digits", changes))
    except RequestError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("steps", [{"teacher": 100}, {"teacher": 1500, "generator": 100}, {"teacher": 1500, "generator": 700}])
def test_whatever_is_refused_can_be_left_as_the_remedy_says_or_lengthened(tmp_path: Path, steps: dict[str, int]) -> None:
    """Each key of a recipe, changed to the first other value that it takes."""
    folder, base, followed = run_at(tmp_path / "run", **steps), load_recipe("digits"), 0
    longer = [f"{section}.duration_kimg=9999" for section in (("distillation",) if "generator" in steps else ("teacher",))]
    for key in sorted(set(recipe_fields(Recipe)) - {"name", "data", "teacher.bundle", "schedule", "objective.reward_scale"}):
        change = f"{key}={other_value(base, key)}"
        message = refusal(folder, base, change)
        # A method sets other keys as well, and one of those may be what differs.
        left = re.search(r"leave it at (\[.*?\]|\S*?)(?:,|$)", message)
        named = re.search(r"(?:contains a run with |^)([a-z_.0-9]+)=", message)
        if left and named:
            back = [change] if named[1] != key else []
            assert refusal(folder, base, *back, f"{named[1]}={left[1]}") == "", message
        elif message:
            assert "lengthen" in message
            assert refusal(folder, base, change, *longer) == "", message
        followed += bool(message)
    assert followed > 40


def other_value(base: Recipe, key: str) -> str:
    """A value of that key that makes another recipe."""
    words = "sid exact own none lognormal cosine KD inception bf16-mixed adm integral jeffreys"
    values = f"true false 1 2 0.5 0.01 50 900 [1] [2,2] [0.05,0.1] [wandb] {words} text"
    for value in values.split():
        with suppress(RequestError):
            if load_recipe("digits", [f"{key}={value}"]) != base:
                return value
    raise AssertionError(f"nothing else for {key}")
