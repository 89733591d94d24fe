"""The parts of recipes that need no torch: built-in recipes, reading YAML, the number of steps of a stage."""

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
        values = parse_yaml(path.read_text())
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}", remedy="give a file that you may read") from error
    except YAML_ERRORS as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{path} is not YAML: {reason}", remedy="compare it with a built-in recipe") from error
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds no recipe", remedy="compare it with a built-in recipe", param="recipe")
    return values


# What reading YAML raises: its own errors, text that is no UTF-8, dates and numbers that are none, and nesting without end.
YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def parse_yaml(text: str) -> object:
    """The value of a YAML text. Raises one of YAML_ERRORS, or RequestError for a key that stands twice in one mapping."""
    return yaml.load(text, _OnceLoader)  # a SafeLoader


class _OnceLoader(yaml.SafeLoader):
    """YAML forbids a key twice in one mapping; PyYAML keeps the last and drops the others without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_lines: dict[str, int] = {}
        for name, line in ((key.value, key.start_mark.line + 1) for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name in first_lines:
                raise RequestError(
                    f"the recipe gives '{name}' twice, in lines {first_lines[name]} and {line}",
                    remedy="keep one of them, with the keys of both",
                    param="recipe",
                )
            first_lines[name] = line
        return super().construct_mapping(node, deep)


def steps_in(kimg: float, batch: int) -> int:
    """The number of steps nearest to kimg thousand images: round(1000 kimg / batch), at least one."""
    # At least one, because a stage without a step has no weights to publish.
    return max(1, round(kimg * 1000 / batch))
