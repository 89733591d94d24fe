"""Training from Python, as a notebook calls it."""

import json
from collections.abc import Mapping
from pathlib import Path

from uni_instruct.bundle import Bundle


def train_recipe(recipe: str | Path, out: str | Path, settings: Mapping[str, object] | None = None) -> Bundle:
    """Trains what a recipe says into the folder `out`, in this process, and returns the generator's bundle.

    recipe: the name of a built-in one, or a YAML file. settings: keys of the recipe and their values, as `train --set` takes
    them: {"method": "dmd2", "distillation.batch": 128}. The same call again goes on where an interrupted one was. In the main
    thread Ctrl-C ends it after the running step; in another thread it ends with its process, and no state is saved for that.

    Raises RequestError, before anything is trained, where recipe, settings, data and teacher do not fit each other.
    """
    from uni_instruct.train.pipeline import train
    from uni_instruct.train.recipe import load_recipe

    overrides = [f"{key}={_text(value)}" for key, value in (settings or {}).items()]
    return train(load_recipe(str(recipe), overrides), Path(out))


def _text(value: object) -> str:
    """The value as it would be written in YAML: JSON, and text as it is."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
