"""Builds a Recipe from a name or file, with the user's changes."""

import dataclasses
import json
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from shlex import quote
from typing import Any

from uni_instruct.bundle import is_bundle
from uni_instruct.errors import RequestError
from uni_instruct.train.config import Recipe
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.objective.methods import METHOD_DEFINING_KEYS, METHODS
from uni_instruct.train.recipe_file import RECIPES, YAML_ERRORS, built_in_recipes, parse_yaml, read_yaml
from uni_instruct.train.recipe_keys import one_of

METHOD_KEY = "objective.method"
# The key that a section's name alone stands for in --set: teacher=... is teacher.bundle=...
SHORT = {"teacher": "teacher.bundle"}


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a built-in name or YAML file, with 'key=value' overrides. Raises RequestError for unknown names and keys.

    A key is written in full (objective.alpha), or by its last part if that is unique (alpha); teacher is short for
    teacher.bundle. An override of the method replaces the keys of the recipe that define a method; other overrides come after.
    """
    path = RECIPES / f"{source}.yaml" if source in built_in_recipes() else Path(source)
    if not path.is_file():
        known = ", ".join(built_in_recipes())
        if (path / "recipe.yaml").is_file():
            remedy = f"give its recipe: {quote(str(path / 'recipe.yaml'))}"
            raise RequestError(f"{source} is the folder of a training, not a recipe", remedy=remedy, param="recipe")
        if path.is_dir() and not is_bundle(path):
            lines = f"'name: mine' and 'data: {json.dumps(source)}'"
            remedy = f"write a file such as mine.yaml with two lines, {lines}, and train that"
            raise RequestError(f"{source} is a folder, not a recipe", remedy=remedy, param="recipe")
        raise RequestError(f"recipe '{source}' is unknown", remedy=f"give a YAML file or one of {known}", param="recipe")
    values = _with_sections(Recipe, read_yaml(path))
    changes = [_read_override(override) for override in overrides]
    # The method is changed first, wherever it is on the command line, so that the other overrides apply on top of it.
    for key, value in sorted(changes, key=lambda change: change[0] != METHOD_KEY):
        if key == METHOD_KEY:
            _change_method(values, value)
        else:
            _set(values, key, value)
    return parse_recipe(values)


def parse_recipe(values: Mapping[str, object]) -> Recipe:
    """A recipe from plain values. Raises RequestError for unknown keys, wrong types and values out of range."""
    # Without a section `objective`, the default method's settings apply, as with an empty section.
    recipe: Recipe = _build(Recipe, {"objective": None} | dict(values), prefix="")
    return recipe


def _change_method(values: dict[str, Any], name: Any) -> None:
    """Change the method: keys that define a method are dropped, other keys stay, and the new method's settings win."""
    one_of(METHOD_KEY, name, METHODS)
    tuning = {key: value for key, value in values.get("objective", {}).items() if key not in METHOD_DEFINING_KEYS}
    values["objective"] = tuning | METHODS[name].settings | {"method": name}


def _read_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise RequestError(f"--set {override} has no value", remedy="write --set key=value", param="set")
    full, text = _full_key(key.strip()), text.strip()
    # The value of a key of type text is taken literally: 2024, yes, [x], photos #2, a: b. In a YAML file these need quotes.
    if not text or (recipe_fields(Recipe)[full].type is str and text[0] not in "\"'"):
        return full, text
    try:
        return full, parse_yaml(text)
    except YAML_ERRORS:
        return full, text  # for example an expression that starts with a character that YAML reserves


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def _full_key(key: str) -> str:
    keys, key = all_keys(), SHORT.get(key, key)
    matches = [k for k in keys if k == key] or [k for k in keys if k.rpartition(".")[2] == key]
    if not matches:
        near = _near(key, keys)
        first = f"choose one of {', '.join(near)}; " if near else ""
        remedy = f"{first}'uni-instruct train --help-recipe' lists all {len(keys)}"
        raise RequestError(f"--set key '{key}' is unknown", remedy=remedy, param="set")
    if len(matches) > 1:
        raise RequestError(f"--set key '{key}' is ambiguous", remedy=f"write {' or '.join(matches)}", param="set")
    return matches[0]


def _near(key: str, keys: Sequence[str]) -> list[str]:
    """Keys whose last part is spelled similarly, the nearest first. For errors, where all keys would fill a page."""
    ends = [each.rpartition(".")[2] for each in keys]
    close = get_close_matches(key.rpartition(".")[2], dict.fromkeys(ends))
    return [each for like in close for each, end in zip(keys, ends, strict=True) if end == like]


def all_keys() -> list[str]:
    """The full names of all keys of a recipe."""
    return list(recipe_fields(Recipe))


def recipe_fields(cls: type, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """The dataclass fields of all keys of a section, by full name, in their order."""
    hints = typing.get_type_hints(cls)
    found: dict[str, dataclasses.Field[Any]] = {}
    for f in dataclasses.fields(cls):
        section = hints[f.name]
        nested = isinstance(section, type) and dataclasses.is_dataclass(section)
        found |= recipe_fields(section, f"{prefix}{f.name}.") if nested else {prefix + f.name: f}
    return found


def _with_sections(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with a copy of each section as a dict, so that single keys can be set in it."""
    hints = typing.get_type_hints(cls)
    return {
        key: dict(_section(hints[key], value, f"{key}.")) if dataclasses.is_dataclass(hints.get(key)) else value
        for key, value in values.items()
    }


def _section(cls: type, values: Any, prefix: str) -> Mapping[str, Any]:
    """The keys of a section; none if it is empty. Raises RequestError if the value is not a mapping."""
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        name, first = prefix.rstrip("."), dataclasses.fields(cls)[0].name
        first = SHORT.get(name, first).rpartition(".")[2]
        raise RequestError(
            f"'{name}' is {reprlib.repr(values)}, not a section",
            remedy=f"indent its keys below it, such as '{first}: ...'",
            param="recipe",
        )
    return values


def _build(cls: type, values: Any, prefix: str) -> Any:
    values = _section(cls, values, prefix)
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise RequestError(
                f"recipe key '{prefix}{key}' is unknown", remedy=f"choose one of {', '.join(names)}", param="recipe"
            )
    missing = [f.name for f in dataclasses.fields(cls) if _required(f) and values.get(f.name) is None]
    if missing:
        raise RequestError(f"recipe has no '{prefix}{missing[0]}'", remedy="give it in a line of its own", param="recipe")
    # The method's settings are defaults. Keys in the recipe override them.
    if cls is ObjectiveConfig:
        method = values.get("method", ObjectiveConfig.method)
        one_of(prefix + "method", method, METHODS)
        values = METHODS[method].settings | dict(values)
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _convert(kind: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, prefix=f"{key}.")
    if isinstance(kind, types.UnionType):  # X | None, or X | str for a word that stands for no X
        first, other = typing.get_args(kind)
        return value if isinstance(value, other) else _convert(first, value, key)
    if isinstance(kind, types.GenericAlias):
        item = typing.get_args(kind)[0]
        if isinstance(value, list | tuple):
            return tuple(_convert(item, v, key) for v in value)
        if not dataclasses.is_dataclass(item):
            return (_convert(item, value, key),)  # one value is a list of one
    elif kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        # YAML reads 1e-4 as a string.
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise _of_wrong_type(kind, value, key)


def _of_wrong_type(kind: Any, value: Any, key: str) -> RequestError:
    if value is None:
        return RequestError(f"recipe key '{key}' is empty", remedy="give it a value, or leave the line out", param="recipe")
    remedy = f"give a value of type {getattr(kind, '__name__', str(kind))}"
    if kind is str and not isinstance(value, list | dict):  # a date, a number, or yes and no
        remedy = f"put it in quotes: '{value}'"
    elif isinstance(kind, types.GenericAlias):
        remedy = "give a list, its entries below it with a '-' before each"
    # Cut: a recipe may hold a megabyte there, or a list that holds itself.
    return RequestError(f"recipe key '{key}' is {reprlib.repr(value)}", remedy=remedy, param="recipe")
