"""The table of `train --help-recipe`: every key of a recipe with default, range and meaning, generated from the code."""

import dataclasses
import textwrap
from typing import Any, NamedTuple

from uni_instruct.train.config import PhaseConfig, Recipe
from uni_instruct.train.recipe import recipe_fields
from uni_instruct.train.recipe_keys import MEANING, RANGE

MIN_WIDTH = 40  # smallest width of the column of meanings, even on a narrower terminal


class RecipeKey(NamedTuple):
    """One row: a key's full name, its default as written in a recipe, the range of a number, and its meaning."""

    key: str
    default: str
    range: str
    meaning: str


def explained_keys() -> list[RecipeKey]:
    """Every key, in the recipe's order. The keys of a phase follow after `schedule`."""
    found = []
    for key, field in recipe_fields(Recipe).items():
        found.append(_row(key, field))
        if key == "schedule":
            found += [_row(f"schedule[].{phase.name}", phase) for phase in dataclasses.fields(PhaseConfig)]
    return found


def recipe_help(width: int) -> str:
    """The table as text. Lines have at most `width` characters, unless the last column would be narrower than MIN_WIDTH."""
    table = [RecipeKey("key", "default", "range", "meaning"), *explained_keys()]
    widths = [max(len(row[column]) for row in table) + 2 for column in range(3)]
    lines = []
    for row in table:
        meaning = textwrap.wrap(row.meaning, max(MIN_WIDTH, width - sum(widths)))
        lines.append("".join(f"{cell:{cells}}" for cell, cells in zip(row[:3], widths, strict=True)) + meaning[0])
        lines += [" " * sum(widths) + more for more in meaning[1:]]
    return "\n".join(lines)


def _row(key: str, field: "dataclasses.Field[Any]") -> RecipeKey:
    return RecipeKey(key, _written(field.default), str(field.metadata.get(RANGE) or "-"), field.metadata[MEANING])


def _written(default: object) -> str:
    """A default as written in YAML; '-' if there is none or if it depends on the network."""
    if default is dataclasses.MISSING:
        return "(required)"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return f"[{', '.join(map(_written, default))}]"
    if default is None or default == "":
        return "-"
    return f"{default:g}" if isinstance(default, float) else str(default)
