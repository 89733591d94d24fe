"""What can be known of a recipe without torch: where it is, what its file holds, how long its stages are."""

from pathlib import Path
from typing import Any

import yaml

from uni_instruct.errors import RequestError

RECIPES = Path(__file__).parent / "recipes"


def built_in_recipes() -> list[str]:
    """Names of the recipes that ship with this package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RequestError where it is none."""
    try:
        # safe_load: a recipe from the internet runs no code.
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{path} is not YAML: {reason}", remedy="compare it with a built-in recipe") from error
    if not isinstance(values, dict):
        raise RequestError(f"{path} holds no recipe", remedy="compare it with a built-in recipe", param="recipe")
    return values


def steps_in(kimg: float, batch: int) -> int:
    """The whole number of batches that comes nearest to so many thousand images, at least one."""
    # Never zero steps, however small the number: a stage that does nothing has no weights to publish.
    return max(1, round(kimg * 1000 / batch))
