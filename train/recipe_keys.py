"""What every key of a recipe has: a default, a meaning in one line, and checks of its value."""

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

from uni_instruct.errors import RequestError

MEANING = "meaning"
Value = TypeVar("Value")


def key(default: Value, meaning: str) -> Value:
    """A dataclass field with that default; its meaning is what `train --help-recipe` prints."""
    # Said to be the value, which is what the field is in every instance: a type checker knows no other kind of default.
    found: Value = dataclasses.field(default=default, metadata={MEANING: meaning})
    return found


def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raises RequestError, with the names, unless the value is one of them."""
    if value not in allowed:
        raise RequestError(f"{key} '{value}' is unknown", remedy=f"choose one of {', '.join(allowed)}", param="recipe")


def in_range(key: str, value: float, low: float, high: float) -> None:
    """Raises RequestError unless low <= value <= high."""
    if not low <= value <= high:
        raise RequestError(f"{key} {value} is out of range", remedy=f"give {low:g} to {high:g}", param="recipe")
