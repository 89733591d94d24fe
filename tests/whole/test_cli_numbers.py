"""Numbers on the command line: every option of every command has a range, and whatever is outside is one line, at once."""

import importlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from uni_instruct.bundle import Bundle
from uni_instruct.cli import COMMANDS

Cli = Callable[..., tuple[int, str, str]]
# Words that make a whole command, so that the number is all that is wrong with it.
ARGUMENTS = {
    "source": "digits",
    "recipe": "digits",
    "bundle": "{bundle}",
    "images": "{bundle}",
    "folder": "{bundle}",
    "a": "{bundle}",
    "b": "{bundle}",
    "checkpoint": "{weights}",
    "url": "http://127.0.0.1:9",
}
OPTIONS = {"--methods": "sid", "--seeds": "0-3", "--reference": "digits", "--std": "0.1"}
# Numbers inside text: what reads them says what they may be.
LISTS = {("generate", "--seeds"), ("evaluate", "--seeds"), ("generate", "--class")}
WRONG = ["nan", "inf", "-inf", "-1", "-0.5", "1e400", "9" * 30, "-" + "9" * 5000, "many", "", "0x10", "1,5", "1 2", "٣.٥"]


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by what one types."""
    for name, (target, _) in COMMANDS.items():
        module, _, attribute = target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", part) for inner, part in command.commands.items())
        else:
            yield name, command


def options_of(command: click.Command) -> Iterator[click.Option]:
    yield from (param for param in command.params if isinstance(param, click.Option))


NUMBERS = {
    (name, option.opts[0]): option
    for name, command in commands()
    for option in options_of(command)
    if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType)
}


def wrong_numbers(option: click.Option) -> Iterator[str]:
    """What the option's range leaves out, and what is no number of its kind."""
    kind = option.type
    assert isinstance(kind, click.IntRange | click.FloatRange)
    assert kind.min is not None
    assert kind.max is not None
    whole = isinstance(kind, click.IntRange)
    step = 1 if whole else 1e-3
    yield from (str(kind.min - step), str(kind.max + max(step, abs(kind.max) / 1e6 if not whole else 1)))
    yield from (text for text in WRONG if not is_in_range(text, kind))
    if whole:
        yield from (f"{kind.min}.5", f"{kind.min}e0", "True")


def is_in_range(text: str, kind: click.IntRange | click.FloatRange) -> bool:
    try:
        number = int(text) if isinstance(kind, click.IntRange) else float(text)
    except ValueError:
        return False
    return float(kind.min or 0) <= number <= float(kind.max or 0)


def whole_call(name: str, command: click.Command, option: str, value: str, places: dict[str, Path]) -> list[str]:
    """A command with all that it needs, and one option's value."""
    words = name.split()
    for param in command.params:
        if isinstance(param, click.Argument) and param.required:
            known = {"run": "{run}"} if name == "average" else ARGUMENTS
            words.append(known[str(param.name)])
        elif isinstance(param, click.Option) and param.opts[0] == "--out":
            words += ["--out", "{out}"]
        elif isinstance(param, click.Option) and param.required and param.opts[0] != option:
            choices = param.type.choices if isinstance(param.type, click.Choice) else [OPTIONS.get(param.opts[0], "")]
            words += [param.opts[0], str(choices[0])]
    return [*(word.format(**places) if "{" in word else word for word in words), f"{option}={value}"]


@pytest.fixture
def places(tmp_path: Path, tiny_bundle: Bundle) -> dict[str, Path]:
    (tmp_path / "run").mkdir()
    return {
        "bundle": tiny_bundle.path,
        "weights": tiny_bundle.path / "model.safetensors",
        "run": tmp_path / "run",
        "out": tmp_path / "out.zip",
    }


def test_every_number_has_a_range_with_both_ends() -> None:
    """The test fails for an option without one, wherever it is added."""
    assert len(NUMBERS) >= 20
    for call, option in NUMBERS.items():
        kind = option.type
        assert isinstance(kind, click.IntRange | click.FloatRange), f"{call} has no range"
        assert kind.min is not None, call
        assert kind.max is not None, call
        assert -math.inf < kind.min < kind.max < math.inf, call
        if isinstance(kind, click.FloatRange):
            assert type(kind).__name__ == "FiniteRange", f"{call}: click's own range lets nan through"


@pytest.mark.parametrize("call", NUMBERS, ids=" ".join)
def test_a_wrong_number_is_one_line_before_anything_is_done(cli: Cli, places: dict[str, Path], call: tuple[str, str]) -> None:
    name, option = call
    command, tried = dict(commands())[name], 0
    for value in wrong_numbers(NUMBERS[call]):
        code, out, errors = cli(*whole_call(name, command, option, value, places))
        assert (code, out, errors.count("\n")) == (2, "", 1), (value[:40], errors[:400])
        assert errors.startswith(f"error: Invalid value for '{option}'"), errors[:400]
        assert not places["out"].exists()
        tried += 1
    assert tried > 10


@pytest.mark.parametrize("call", sorted(LISTS), ids=" ".join)
@pytest.mark.parametrize(
    "value",
    [
        *(text for text in WRONG if text != "1,5"),
        "5-3",
        "0-",
        "-",
        "0-99999999999999999999",
        "1.5",
        "0-1e3",
        "0--1",
        ",",
        "1;2",
    ],
)
def test_a_wrong_number_in_a_list_is_one_line(cli: Cli, places: dict[str, Path], call: tuple[str, str], value: str) -> None:
    name, option = call
    code, out, errors = cli(*whole_call(name, dict(commands())[name], option, value, places))
    assert (code, out, errors.count("\n")) == (2, "", 1), errors[:400]
    assert errors.startswith("error: ")
    assert len(errors) < 400
    assert not places["out"].exists()
