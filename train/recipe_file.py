"""The parts of recipes that need no torch: built-in recipes, reading YAML, the number of steps of a stage."""

import re
from pathlib import Path
from typing import Any

import yaml

from uni_instruct.errors import RequestError

RECIPES = Path(__file__).parent / "recipes"


def built_in_recipes() -> list[str]:
    """Names of the recipes that ship with this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, object]:
    """The mapping in a YAML file. Raises RequestError if it cannot be read, is not a mapping, or has a key twice."""
    try:
        values = parse_yaml(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}", remedy="give a file that you may read") from error
    except YAML_ERRORS as error:
        raise _not_yaml(path, error) from error
    if not isinstance(values, dict):
        found = "is empty" if values is None else "is a list" if isinstance(values, list) else "has no keys"
        remedy = "give each key a line with a space after its colon, such as 'data: digits'"
        raise RequestError(f"{path} holds no recipe: it {found}", remedy=remedy, param="recipe")
    return values


# What reading YAML raises: its own errors, dates that are none and numbers of 5,000 digits, and nesting without end.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def parse_yaml(text: str | bytes) -> object:
    """The value of a YAML text. Raises one of YAML_ERRORS, or RequestError for a key given twice in one mapping."""
    try:
        return yaml.load(text, _RecipeLoader)  # a SafeLoader
    except (LookupError, TypeError, AttributeError) as error:  # PyYAML's, of a tag such as !!int before what is none
        raise yaml.YAMLError("a tag (!!) stands before what is nothing of the kind") from error


class _RecipeLoader(yaml.SafeLoader):
    """YAML as people expect it. A key given twice is an error; PyYAML silently keeps the last. Plain words and numbers are
    those of YAML 1.2: in 1.1, 010 is 8, 1:30 is 90, off is false, and a date is not text.
    """

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """The mapping as written. Merges (<<) add their keys later, and may repeat some."""
        node = super().compose_mapping_node(anchor)
        first_lines: dict[str, int] = {}
        for name, line in ((key.value, key.start_mark.line + 1) for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name in first_lines:
                merges = "list both in one: '<<: [*a, *b]'"
                raise RequestError(
                    f"the recipe gives '{name}' twice, in lines {first_lines[name]} and {line}",
                    remedy=merges if name == "<<" else "keep one of them, with the keys of both",
                    param="recipe",
                )
            first_lines[name] = line
        return node


_RecipeLoader.yaml_implicit_resolvers = {}
for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _not_yaml(path: Path, error: Exception) -> RequestError:
    mark = getattr(error, "problem_mark", None)
    reason = " ".join(str(getattr(error, "problem", None) or error).split())
    where = f" in line {mark.line + 1}" if mark is not None else ""
    remedy = f"compare it with {RECIPES / 'digits.yaml'}"
    if isinstance(error, yaml.reader.ReaderError):
        remedy = "save it as text in UTF-8"
    elif "'\\t'" in reason:
        remedy = "put spaces there, as YAML takes no tabs"
    elif "but found another document" in reason:
        remedy = "keep one of its documents: remove what follows the line ---"
    return RequestError(f"{path} is not YAML: {reason}{where}", remedy=remedy, param="recipe")


def steps_in(kimg: float, batch: int) -> int:
    """The number of steps nearest to kimg thousand images: round(1000 kimg / batch), at least one."""
    # At least one, because a stage without a step has no weights to publish.
    return max(1, round(kimg * 1000 / batch))
