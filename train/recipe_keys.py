"""The definition of a recipe's keys: default, meaning in one line, range of a number; and checks of values."""

import dataclasses
import reprlib
from collections.abc import Iterable
from typing import Any, TypeVar

from uni_instruct.errors import RequestError

MEANING, RANGE = "meaning", "range"
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a key may have, both ends included. off: for error messages, which value switches the key off."""

    low: float
    high: float
    off: str = ""

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high  # false for nan

    def __str__(self) -> str:
        return f"{_number(self.low)} to {_number(self.high)}"


# Widths of power-function averages, relative to training time. The upper end is just below 1 / sqrt(12) = 0.289, the width of
# the uniform mean of all weights.
MIN_AVERAGE_WIDTH, WIDEST_AVERAGE = 0.005, 0.28
# Ranges that many keys share: thousands of images, a share of a whole, a learning rate, a bound of a gradient, a scale.
KIMG = Range(0, 1e9)
SOME_KIMG = Range(1e-6, 1e9)
SHARE = Range(0, 1, "0 is none")
RATE = Range(0, 100)
BOUND = Range(0, 1e9, "0 is no bound")
SCALE = Range(0, 1e9, "0 leaves the term out")


def key(default: Value, meaning: str, within: Range | None = None) -> Value:
    """A dataclass field with that default. `train --help-recipe` prints its meaning and range."""
    # Typed as the default's type rather than as a Field, because a type checker expects a default of the field's type.
    found: Value = dataclasses.field(default=default, metadata={MEANING: meaning, RANGE: within})
    return found


def check_ranges(section: str, config: Any) -> None:
    """Raise RequestError if a number of a section, or a number in one of its lists, is outside the range of its field."""
    for field in dataclasses.fields(config):
        within, value = field.metadata.get(RANGE), getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if within is not None and number is not None and number not in within:
                raise out_of_range(f"{section}.{field.name}", number, within)


def brief(value: object) -> str:
    """What a recipe holds there, cut: it may be a megabyte, or a list that holds itself."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def one_of(key: str, value: object, allowed: Iterable[str]) -> None:
    """Raise RequestError, which lists the names, unless the value is one of them."""
    names = list(allowed)
    if value not in names:
        shown = value if isinstance(value, str) and len(value) < 60 else brief(value).strip("'")
        raise RequestError(f"{key} '{shown}' is unknown", remedy=f"choose one of {', '.join(names)}", param="recipe")


def in_range(key: str, value: float, low: float, high: float) -> None:
    """Raise RequestError unless low <= value <= high. For limits that depend on another key."""
    if value not in Range(low, high):
        raise out_of_range(key, value, Range(low, high))


def out_of_range(key: str, value: float, within: Range) -> RequestError:
    """The error for a number outside its range."""
    off = f", where {within.off}" if within.off else ""
    return RequestError(f"{key} {_number(value)} is out of range", remedy=f"give {within}{off}", param="recipe")


def _number(value: float) -> str:
    """Whole numbers in full, as a recipe takes them for a count; one with a thousand digits is cut."""
    return brief(value) if isinstance(value, int) else f"{value:g}"
