"""What every configuration checks of its values."""

from collections.abc import Iterable

from uni_instruct.errors import RequestError


def one_of(key: str, value: str, allowed: Iterable[str]) -> None:
    """Raises RequestError, with the names, unless the value is one of them."""
    if value not in allowed:
        raise RequestError(f"{key} '{value}' is unknown", remedy=f"choose one of {', '.join(allowed)}", param="recipe")


def in_range(key: str, value: float, low: float, high: float) -> None:
    """Raises RequestError unless low <= value <= high."""
    if not low <= value <= high:
        raise RequestError(f"{key} {value} is out of range", remedy=f"give {low:g} to {high:g}", param="recipe")
