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
    if re.match(r"add a line '\w+: \.\.\.'$", remedy) or remedy.startswith("--set data=..."):
        return "digits"
    if remedy == "give it a value, or leave the line out":
        return LEFT_OUT
    if remedy.startswith("give a list: one entry per line"):
        return [] if key == "schedule" else [1]
    wanted = {"give a whole number": 1, "give a number": 1.0, "give true or false": True, "give text": "text"}
    if remedy in wanted:
        return wanted[remedy] if default in (None, "", dataclasses.MISSING) else default
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
        ("published: 2024", "recipe key 'published' is 2024; put it in quotes: '2024'"),
        ("published: true", "recipe key 'published' is True; put it in quotes: 'True'"),
        ("loop: {metric: off}", "loop.metric 'off' is unknown; choose one of FD, KD, none"),
        ("teacher: {batch: 010}", "recipe key 'teacher.batch' is '010'; write 10"),
        ('teacher: {batch: "64"}', "recipe key 'teacher.batch' is '64'; write 64"),
        ("teacher: {batch: 1:30}", "recipe key 'teacher.batch' is '1:30'; give a whole number"),
        ("teacher: {duration_kimg: 1:30.5}", "recipe key 'teacher.duration_kimg' is '1:30.5'; give a number"),
        ("teacher: {batch: 0.5}", "recipe key 'teacher.batch' is 0.5; give a whole number"),
        ("loop: {compile: y}", "recipe key 'loop.compile' is 'y'; give true or false"),
        (f"teacher: {{batch: 0x{'f' * 9000}}}", "teacher.batch a number of thousands of digits is out of range"),
        (f"network: {{conditional: 0x{'f' * 9000}}}", "'network.conditional' is a number of thousands of digits; give true"),
        ("teacher: {batch: !!int ''}", "is not YAML: a tag (!!) stands before what is nothing of the kind"),
        ("teacher: {learning_rate: !!float _}", "is not YAML: a tag (!!)"),
        ("loop: {compile: !!bool x}", "is not YAML: a tag (!!)"),
        ("published: !!timestamp x", "is not YAML: a tag (!!)"),
        ("loop: !!map [1]", "is not YAML: expected a mapping node, but found sequence in line 3"),
        ("loop:\n\tseed: 1", "is not YAML: found character '\\t' that cannot start any token in line 4; put spaces there"),
        ("---\nname: y", "is not YAML: but found another document in line 3; keep one of its documents"),
        ("name:x", "is not YAML: could not find expected ':' in line 4; compare it with"),
        ("loop: {batch: 5}", "'loop.batch' is unknown; write 'batch' indented below 'teacher:' or 'distillation:'"),
        ("teacher.batch: 5", "recipe key 'teacher.batch' is unknown; write 'batch' indented below 'teacher:'"),
        ("Teacher: {batch: 5}", "recipe key 'Teacher' is unknown; choose one of teacher"),
        ("objective: {wight: sid}", "recipe key 'objective.wight' is unknown; choose one of weighting"),
        ("objective: {zzz: sid}", "recipe key 'objective.zzz' is unknown; 'uni-instruct train --help-recipe' lists"),
        ("loop: {trackers: [wandb, wandb]}", "loop.trackers has wandb twice; give each once"),
        (
            "teacher: &t {batch: 8}\ndistillation: {<<: *t, <<: *t}",
            "gives '<<' twice, in lines 4 and 4; list both in one: '<<:",
        ),
        (
            "schedule: [{until_kimg: 1, objective: {}}, {until_kimg: 1, objective: {}}]",
            "until_kimg [1.0, 1.0] do not rise, or reach duration_kimg 200; give numbers that rise and stay below 200",
        ),
        (
            "schedule: [{until_kimg: 1, objective: {}}, {until_kimg: 2, objective: {tmin: 1e4}}]",
            "schedule, entry 2: objective.tmin 10000 is out of range; give 0 to 999",
        ),
        (f'objective: {{divergence: "{"(" * 9000}"}}', "((( ... ((("),
        ("loop: {seed: }", "recipe key 'loop.seed' is empty; give it a value, or leave the line out"),
        ("loop: {seed: 1}\nteacher: {batch: 8}\nloop: {samples: 9}", "gives 'loop' twice, in lines 3 and 5; keep one of them"),
        ("loop: {seed: 1, seed: 2}", "gives 'seed' twice, in lines 3 and 3"),
        ("schedule: [{until_kimg: 1}]", "schedule, entry 1: the recipe has no key 'schedule.objective'"),
        ("schedule: {until_kimg: 3}", "recipe key 'schedule' is {'until_kimg': 3}; give a list"),
        ("schedule: [sid]", "'schedule' is 'sid', not a section"),
        ("loop: &a [*a]", "]]]]]]], not a section"),
        ("1: 2", "recipe key '1' is unknown"),
        ("loop: {grid: !!python/name:os.system }", "is not YAML"),
        ("teacher: {duration_kimg: .inf}", "teacher.duration_kimg inf is out of range; give 0.001 to 1e+09"),
        ("distillation: {ema_halflife_kimg: [5, 5]}", "distillation.ema_halflife_kimg has 5 twice; give each once"),
        (
            "distillation: {critic_warmup_kimg: 300}",
            "critic_warmup_kimg 300 leaves no training for the generator: it is not below",
        ),
    ],
)
def test_what_yaml_makes_of_a_slip_is_one_line(cli: Cli, tmp_path: Path, text: str, message: str) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(f"name: x\ndata: digits\n{text}\n")
    code, _, errors = cli("train", recipe, "--out", out)
    assert (code, errors.count("\n")) == (2, 1), errors
    assert message in errors
    assert len(errors) < 1500
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("published: 2026-11-29", "published", "2026-11-29"),
        ("published: yes", "published", "yes"),
        ("published: 012", "published", "012"),
        ("published: 1:30", "published", "1:30"),
        ("teacher: {batch: 1e3}", "teacher.batch", 1000),
        ("teacher: {batch: 64.0}", "teacher.batch", 64),
        ("teacher: {batch: 0x10}", "teacher.batch", 16),
        ("teacher: {batch: 1_000}", "teacher.batch", 1000),
        ("teacher: {learning_rate: 1e-4}", "teacher.learning_rate", 1e-4),
        ("teacher: {duration_kimg: 010}", "teacher.duration_kimg", 10),
        ("loop: {compile: on, report: No}", "loop.compile", True),
        ("loop: {compile: on, report: No}", "loop.report", False),
        ("loop: {channels_last: yes}", "loop.channels_last", True),
        # A mapping that merges another is merged by a third before it is built itself.
        (
            "teacher: &t {batch: 64}\nschedule: [{until_kimg: 1, objective: &p {method: sid, <<: {alpha: 1}, alpha: 0.5}}]\n"
            "objective: {<<: *p}",
            "objective.alpha",
            0.5,
        ),
    ],
)
def test_what_people_write_is_read_as_they_mean_it(tmp_path: Path, text: str, key: str, meant: object) -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # as Windows' editors and PowerShell's > save it
        (tmp_path / "r.yaml").write_bytes(f"name: x\r\ndata: digits\r\n{text}\n".encode(encoding))
        values: Any = dataclasses.asdict(load_recipe(str(tmp_path / "r.yaml")))
        for part in key.split("."):
            values = values[part]
        assert values == meant


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no recipe: it is empty; give each key a line with a space after its colon, such as 'data: digits'"),
        (b"- name: x\n", "holds no recipe: it is a list"),
        (b"name:x\ndata:digits\n", "holds no recipe: it has no keys; give each key a line with a space after its colon"),
        (b"name: caf\xe9\ndata: digits\n", "unacceptable character #x00e9: invalid continuation byte"),
        ("name: x\n".encode("utf-32"), "save it as text in UTF-8"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_what_it_lacks(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(RequestError, match=re.escape(message)):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\0b", "\x1b[31m", "\ud800", "x" * 101])
def test_a_name_is_a_line_of_text(name: str) -> None:
    """A surrogate was a traceback when the trained teacher was to be written."""
    with pytest.raises(RequestError, match="give a line of text of up to 100 characters, such as mine") as refused:
        parse_recipe({"name": name, "data": "digits"})
    assert len(str(refused.value)) < 400
    assert parse_recipe({"name": refused.value.remedy.rpartition(" ")[2], "data": "digits"}).name == "mine"


def test_an_empty_section_means_its_defaults(tmp_path: Path) -> None:
    plain, empty = tmp_path / "plain.yaml", tmp_path / "empty.yaml"
    plain.write_text("name: x\ndata: digits\n")
    empty.write_text("name: x\ndata: digits\nnetwork:\nteacher:\nobjective:\ndistillation:\nloop:\nschedule: []\n")
    assert load_recipe(str(empty)) == load_recipe(str(plain))
    assert load_recipe(str(empty), ["loop.seed=3", "method=dmd2"]).loop.seed == 3
    phases = [
        parse_recipe({"name": "x", "data": "digits", "schedule": [{"until_kimg": 1, "objective": o}]}) for o in ({}, None)
    ]
    assert phases[0] == phases[1]


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
