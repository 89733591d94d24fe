"""Builds a Recipe from a name or file, with the user's changes."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from shlex import quote
from typing import Any

from uni_instruct.bundle import is_bundle
from uni_instruct.data import open_dataset
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.train.config import Recipe
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.objective.methods import METHOD_DEFINING_KEYS, METHODS
from uni_instruct.train.recipe_file import RECIPES, YAML_ERRORS, built_in_recipes, parse_yaml, read_yaml
from uni_instruct.train.recipe_keys import brief, one_of

METHOD_KEY = "objective.method"
# A recipe without a section `objective` minimises the exact reverse KL. It needs no density ratio and has trained on every data
# set tried; Uni-Instruct's forward KL from tmin=0 diverged on digits (docs/objective.md, "Measured on digits").
DEFAULT_OBJECTIVE = {"method": "sid", "alpha": 0.5}
# The key that a section's name alone means in --set: teacher=... is teacher.bundle=...
SHORT = {"teacher": "teacher.bundle"}


def load_recipe(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a built-in name or YAML file, with 'key=value' overrides. Raises RequestError for unknown names and keys.

    A key is written in full (objective.alpha), or by its last part if that is unique (alpha); teacher is short for
    teacher.bundle. An override of the method replaces the keys of the recipe that define a method; other overrides come after.
    """
    path = RECIPES / f"{source}.yaml" if source in built_in_recipes() else Path(source)
    if not source or not path.is_file():
        known = ", ".join(built_in_recipes())
        if (path / "recipe.yaml").is_file():
            remedy = f"give its recipe: {quote(str(path / 'recipe.yaml'))}"
            raise RequestError(f"{source} is the folder of a training, not a recipe", remedy=remedy, param="recipe")
        if source and path.is_dir() and not is_bundle(path):
            remedy = f"write a file such as mine.yaml with the lines {_recipe_lines(source)}, and train that"
            raise RequestError(f"{source} is a folder, not a recipe", remedy=remedy, param="recipe")
        raise RequestError(f"recipe '{source}' is unknown", remedy=f"give a YAML file or one of {known}", param="recipe")
    values = _with_sections(Recipe, read_yaml(path))
    # Before the overrides, so that `--set critic_updates=2` changes one key of the default objective and not the objective.
    values["objective"] = values.get("objective") or dict(DEFAULT_OBJECTIVE)
    changes = [_read_override(override) for override in overrides]
    # The method is changed first, wherever it is on the command line, so that the other overrides apply on top of it.
    for key, value in sorted(changes, key=lambda change: change[0] != METHOD_KEY):
        if key == METHOD_KEY:
            _change_method(values, value)
        else:
            _set(values, key, value)
    changed = {key for key, _ in changes if not key.startswith("loop.")} - {"name", "published"}
    if changed and "measured" not in changed:
        values.pop("measured", None)  # it was measured with the recipe as it is in its file
    return parse_recipe(values)


def parse_recipe(values: Mapping[str, object]) -> Recipe:
    """A recipe from plain values. Raises RequestError for unknown keys, wrong types and values out of range."""
    objective = values.get("objective") or DEFAULT_OBJECTIVE
    recipe: Recipe = _build(Recipe, dict(values) | {"objective": objective}, prefix="")
    return recipe


def _recipe_lines(folder: str) -> str:
    """The lines of a recipe that trains on a folder of images, quoted, for a message."""
    lines = ["name: mine", f"data: {json.dumps(folder)}"]
    with suppress(UniInstructError):  # a folder that cannot be read: the recipe's training says why
        if not open_dataset(folder).num_classes:
            lines.append("network: {conditional: false}")
    *first, last = (f"'{line}'" for line in lines)
    return f"{', '.join(first)} and {last}"


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
        found |= recipe_fields(section, f"{prefix}{f.name}.") if _is_section(section) else {prefix + f.name: f}
    return found


def _with_sections(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with a copy of each section as a dict, so that single keys can be set in it."""
    hints = typing.get_type_hints(cls)
    return {
        key: dict(_section(hints[key], value, f"{key}.")) if _is_section(hints.get(key)) else value
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
            f"'{name}' is {brief(values)}, not a section",
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
            raise _unknown(prefix, key, names)
    required = [f.name for f in dataclasses.fields(cls) if _required(f)]
    # A section that is there and empty has its defaults, here as elsewhere.
    missing = [name for name in required if values.get(name) is None and not (name in values and _is_section(hints[name]))]
    if missing:
        problem = f"the recipe has no key '{prefix}{missing[0]}'"
        raise RequestError(problem, remedy=f"add a line '{missing[0]}: ...'", param="recipe")
    # The method's settings are defaults. Keys in the recipe override them.
    if cls is ObjectiveConfig:
        method = values.get("method", ObjectiveConfig.method)
        one_of(prefix + "method", method, METHODS)
        values = METHODS[method].settings | dict(values)
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def _unknown(prefix: str, key: object, names: Sequence[str]) -> RequestError:
    """The error for a key that a section does not have: it may be one of another section, or written in full at the top."""
    known = all_keys()
    full = [each for each in known if str(key) in (each, each.rpartition(".")[2]) and "." in each]
    near = get_close_matches(str(key), names) or (names if len(names) < 20 else ())
    remedy = f"choose one of {', '.join(near)}" if near else "'uni-instruct train --help-recipe' lists those there are"
    if full and not prefix.startswith("schedule"):
        name = full[0].rpartition(".")[2]
        sections = " or ".join(f"'{each.rpartition('.')[0]}:'" for each in full)
        remedy = f"write '{name}' indented below {sections}"
    shown = str(key) if len(str(key)) < 60 else brief(key)
    return RequestError(f"recipe key '{prefix}{shown}' is unknown", remedy=remedy, param="recipe")


def _is_section(kind: Any) -> bool:
    """Whether a key of that type has keys of its own."""
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _convert(kind: Any, value: Any, key: str) -> Any:
    if _is_section(kind):
        return _build(typing.cast(type, kind), value, prefix=f"{key}.")
    if isinstance(kind, types.UnionType):  # X | None, or X | str for a word that means no X
        first, other = typing.get_args(kind)
        word = isinstance(value, other) and not (first is bool and value in _SWITCHES)
        return value if word else _convert(first, value, key)
    if isinstance(kind, types.GenericAlias):
        item = typing.get_args(kind)[0]
        if isinstance(value, list | tuple):
            return tuple(_entry(item, entry, key, number) for number, entry in enumerate(value))
        if not _is_section(item):
            return (_convert(item, value, key),)  # one value is a list of one
    elif isinstance(value, bool) if kind is bool else isinstance(value, kind) and not isinstance(value, bool):
        return value
    elif (meant := _as_meant(kind, value)) is not None:
        return meant
    raise _of_wrong_type(kind, value, key)


def _entry(item: Any, value: Any, key: str, number: int) -> Any:
    """An entry of a list. Of phases, which have keys of their own, an error says in which it is: others may be right."""
    if not _is_section(item):
        return _convert(item, value, key)
    try:
        return _convert(item, value, key)
    except RequestError as error:
        problem = f"{key}, entry {number + 1}: {error.problem}"
        raise RequestError(problem, remedy=error.remedy, param=error.param) from error


# What YAML 1.1 has for true and false, beside these two words themselves.
_WORDS = {"yes": True, "on": True, "no": False, "off": False}
_SWITCHES = {form(word): on for word, on in _WORDS.items() for form in (str.lower, str.capitalize, str.upper)}


def _as_meant(kind: Any, value: Any) -> Any:
    """A value of another type that says what is meant: 1e-4 in quotes, 1e3 for a whole number, on for true; None for none."""
    if kind is bool and isinstance(value, str):
        return _SWITCHES.get(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    return None


_WANTED = {bool: "give true or false", int: "give a whole number", float: "give a number", str: "give text"}


def _of_wrong_type(kind: Any, value: Any, key: str) -> RequestError:
    if value is None:
        return RequestError(f"recipe key '{key}' is empty", remedy="give it a value, or leave the line out", param="recipe")
    remedy = _WANTED.get(kind, "give a list: one entry per line below the key, each after a '-'")
    if kind is str and not isinstance(value, list | dict):  # a number, or true and false
        remedy = f"put it in quotes: '{brief(value)}'"
    elif kind is int and isinstance(value, str):
        with suppress(ValueError):
            remedy = f"write {brief(int(value))}"  # in quotes, or 010, which is 8 to some and 10 to others
    return RequestError(f"recipe key '{key}' is {brief(value)}", remedy=remedy, param="recipe")
