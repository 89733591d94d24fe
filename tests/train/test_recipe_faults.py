"""Wrong recipes: every key out of type and out of range is one line before any training, and its remedy is accepted."""

import dataclasses
import datetime
import math
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from uni_instruct.errors import RequestError
from uni_instruct.train.config import PhaseConfig, Recipe
from uni_instruct.train.recipe import load_recipe, parse_recipe, recipe_fields
from uni_instruct.train.recipe_help import explained_keys, recipe_help
from uni_instruct.train.recipe_keys import RANGE, Range

Cli = Callable[..., tuple[int, str, str]]
LEFT_OUT = object()


def kinds() -> dict[str, Any]:
    """The type of every key."""
    found: dict[str, Any] = {}

    def walk(cls: type, prefix: str) -> None:
        for name, kind in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(kind):
                walk(kind, f"{prefix}{name}.")
            elif prefix + name in fields:
                found[prefix + name] = kind

    fields = recipe_fields(Recipe)
    walk(Recipe, "")
    return found


KINDS, FIELDS = kinds(), recipe_fields(Recipe)


def is_number(kind: Any) -> bool:
    """int, float, either or none, or a list of them."""
    parts = [kind, *typing.get_args(kind), *(item for part in typing.get_args(kind) for item in typing.get_args(part))]
    return bool({int, float} & {part for part in parts if isinstance(part, type)})


NUMBERS = [key for key, kind in KINDS.items() if is_number(kind)]


def recipe_with(key: str, value: Any) -> dict[str, Any]:
    """A small recipe with one key changed, or left out."""
    values: dict[str, Any] = {"name": "x", "data": "digits"}
    section, _, name = key.rpartition(".")
    home = values.setdefault(section, {}) if section else values
    home[name] = value
    if value is LEFT_OUT:
        del home[name]
    return values


def wrong_values(key: str) -> Iterator[Any]:
    """Values that no recipe may have there."""
    kind, within = KINDS[key], FIELDS[key].metadata.get(RANGE)
    optional = type(None) in typing.get_args(kind)
    listed = "tuple" in str(kind)
    yield {"a": 1}
    if not optional:
        yield None
    if is_number(kind):
        assert isinstance(within, Range)
        bad: list[Any] = [math.nan, math.inf, -math.inf, 10**400, within.low - 1, within.high * 2 + 1, "many", True]
        yield from ([value] for value in bad) if listed else bad
    elif kind is bool:
        yield from (1, "maybe", [True], 0.5)
    elif kind is str:
        yield from (5, True, 1.5, datetime.date(2026, 11, 29), ["x"])
    if not listed and kind is not str:
        yield ["x"]


WRONG = [(key, value) for key in KINDS for value in wrong_values(key)]


def followed(remedy: str, key: str) -> Any:
    """The value that a remedy asks for; fails where it asks for none."""
    kind, default = str(KINDS.get(key, dict)), FIELDS[key].default if key in FIELDS else {}
    if found := re.match(r"give (-?[\d.e+-]+) to (-?[\d.e+-]+)(?:, where .*)?$", remedy):
        number = float(found[1])
        low = int(number) if "int" in kind else number
        return [low] if "tuple" in kind else low
    if found := re.match(r"choose one of ([^,]+)", remedy):
        return int(found[1]) if "int" in kind else found[1]
    if found := re.match(r"put it in quotes: '(.*)'$", remedy):
        return found[1]
    if remedy == "give it in a line of its own" or remedy.startswith("--set data=..."):
        return "digits"
    if remedy == "give it a value, or leave the line out":
        return LEFT_OUT
    if remedy.startswith("give a list, its entries below it"):
        return [] if key == "schedule" else [1]
    if found := re.match(r"give a value of type (\w+)$", remedy):
        text = found[1]
        return (
            {"int": 1, "float": 1.0, "bool": True, "str": "text"}[text]
            if default in (None, "", dataclasses.MISSING)
            else default
        )
    return pytest.fail(f"nobody can follow '{remedy}'")


def mended(key: str, value: Any) -> Recipe:
    """The recipe that comes of doing as its errors say."""
    for _ in range(4):
        try:
            return parse_recipe(recipe_with(key, value))
        except RequestError as error:
            value = followed(error.remedy, key)
    return pytest.fail(f"{key}: the remedies lead nowhere")


def refusal(values: dict[str, Any]) -> str:
    """Why a recipe is refused, '' where it is not: the end of one key's range may not fit the default of another."""
    try:
        parse_recipe(values)
    except RequestError as error:
        return str(error)
    return ""


def test_every_number_has_a_range_that_holds_its_default() -> None:
    """The test fails for a number without one, wherever it is added."""
    assert len(NUMBERS) > 60
    phases = {f"schedule.{field.name}": field for field in dataclasses.fields(PhaseConfig) if field.type in (int, float)}
    assert phases
    for key, field in {**{key: FIELDS[key] for key in NUMBERS}, **phases}.items():
        within = field.metadata.get(RANGE)
        assert isinstance(within, Range), f"{key} has no range"
        assert -math.inf < within.low < within.high < math.inf, key
        default = field.default if isinstance(field.default, tuple) else (field.default,)
        assert all(value in within for value in default if isinstance(value, int | float)), key


@pytest.mark.parametrize("key", NUMBERS)
def test_both_ends_of_a_range_are_let_in_and_nothing_beyond(key: str) -> None:
    within, listed = FIELDS[key].metadata[RANGE], "tuple" in str(KINDS[key])
    for value in (within.low, within.high):
        assert f"{key} {value} is out of range; give {within}" not in refusal(recipe_with(key, [value] if listed else value))
    for value in (math.nan, math.inf, -math.inf):
        given = [value] if listed else value
        with pytest.raises(RequestError) as refused:
            parse_recipe(recipe_with(key, given))
        assert key in str(refused.value)


def test_there_are_wrong_recipes_enough() -> None:
    assert len(WRONG) > 400
    assert {key for key, _ in WRONG} == set(KINDS)


@pytest.mark.parametrize("key", KINDS)
def test_a_wrong_value_is_one_line_that_names_the_key_and_whose_remedy_works(key: str) -> None:
    for value in wrong_values(key):
        with pytest.raises(RequestError) as refused:
            parse_recipe(recipe_with(key, value))
        message = str(refused.value)
        assert refused.value.exit_code == 2, message
        assert key in message
        assert "\n" not in message
        assert len(message) < 400, message
        mended(key, value)


@pytest.mark.parametrize(
    ("setting", "spelling"),
    [
        ("teacher.clip_norm", "0 is no bound"),
        ("distillation.critic_clip_value", "0 is no bound"),
        ("distillation.micro_batch", "0 is all of its share"),
        ("distillation.decay_kimg", "0 keeps the rate"),
        ("objective.adversarial_scale", "0 leaves the term out"),
        ("objective.teacher_guidance", "1 is none"),
        ("loop.samples", "loop.metric=none scores nothing"),
        ("teacher.evaluate_kimg", "loop.metric=none scores nothing"),
    ],
)
def test_minus_one_for_off_is_told_how_off_is_written(setting: str, spelling: str) -> None:
    with pytest.raises(RequestError, match=f"{setting} -1 is out of range; give .*, where {spelling}"):
        load_recipe("digits", [f"{setting}=-1"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacher: path.pkl", "'teacher' is 'path.pkl', not a section; indent its keys below it, such as 'bundle: ...'"),
        ("network: [ddpmpp]", "'network' is ['ddpmpp'], not a section"),
        ("objective: {method: [sid]}", "objective.method '['sid']' is unknown; choose one of diff-instruct"),
        ("objective: {method: {sid: 1}}", "objective.method"),
        ("objective: sid", "'objective' is 'sid', not a section; indent its keys below it, such as 'method: ...'"),
        ("published: 2026-11-29", "recipe key 'published' is datetime.date(2026, 11, 29); put it in quotes: '2026-11-29'"),
        ("published: 2026-13-45", "is not YAML: month must be in 1..12"),
        ("published: yes", "recipe key 'published' is True; put it in quotes: 'True'"),
        ("loop: {seed: }", "recipe key 'loop.seed' is empty; give it a value, or leave the line out"),
        ("loop: {seed: 1}\nteacher: {batch: 8}\nloop: {samples: 9}", "gives 'loop' twice, in lines 3 and 5; keep one of them"),
        ("loop: {seed: 1, seed: 2}", "gives 'seed' twice, in lines 3 and 3"),
        ("schedule: {until_kimg: 3}", "recipe key 'schedule' is {'until_kimg': 3}; give a list"),
        ("schedule: [sid]", "'schedule' is 'sid', not a section"),
        ("loop: &a [*a]", "]]]]]]], not a section"),
        ("1: 2", "recipe key '1' is unknown"),
        ("loop: {grid: !!python/name:os.system }", "is not YAML"),
        ("teacher: {duration_kimg: .inf}", "teacher.duration_kimg inf is out of range; give 0.001 to 1e+09"),
        ("distillation: {ema_halflife_kimg: [5, 5]}", "distillation.ema_halflife_kimg has 5 twice; give each once"),
        ("distillation: {critic_warmup_kimg: 300}", "critic_warmup_kimg 300 leaves the generator nothing of its duration_kimg"),
    ],
)
def test_what_yaml_makes_of_a_slip_is_one_line(cli: Cli, tmp_path: Path, text: str, message: str) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(f"name: x\ndata: digits\n{text}\n")
    code, _, errors = cli("train", recipe, "--out", out)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert message in errors
    assert not out.exists()


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    plain, empty = tmp_path / "plain.yaml", tmp_path / "empty.yaml"
    plain.write_text("name: x\ndata: digits\n")
    empty.write_text("name: x\ndata: digits\nnetwork:\nteacher:\nobjective:\ndistillation:\nloop:\nschedule: []\n")
    assert load_recipe(str(empty)) == load_recipe(str(plain))
    assert load_recipe(str(empty), ["loop.seed=3", "method=dmd2"]).loop.seed == 3


@pytest.mark.parametrize(("given", "name"), [("2024", "2024"), ("2024-01-01", "2024-01-01"), ("on", "on"), ("[x]", "[x]")])
def test_text_on_the_command_line_is_text(given: str, name: str) -> None:
    assert load_recipe("digits", [f"name={given}"]).name == name


def test_a_section_on_the_command_line_leaves_a_wrong_file_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\nloop: 5\n")
    with pytest.raises(RequestError, match="'loop' is 5, not a section"):
        load_recipe(str(tmp_path / "r.yaml"), ["loop.seed=3"])


def test_help_shows_every_range() -> None:
    shown = {row.key: row.range for row in explained_keys()}
    assert all(shown[key] == str(FIELDS[key].metadata[RANGE]) for key in NUMBERS)
    assert re.search(r"teacher\.batch +128 +1 to 1000000 +images of a step", recipe_help(140))


def test_a_whole_recipe_passes_through_yaml_unchanged() -> None:
    recipe = load_recipe("digits-jeffreys")
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
