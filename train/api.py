"""Training from Python, for example from a notebook."""

import json
from collections.abc import Mapping
from pathlib import Path

from uni_instruct.bundle import Bundle


def train_recipe(recipe: str | Path, out: str | Path, settings: Mapping[str, object] | None = None) -> Bundle:
    """Train a recipe in this process, into the folder `out`. Returns the generator's bundle.

    recipe: the name of a built-in recipe, or a YAML file. settings: recipe keys and values, as in `train --set`, for example
    {"method": "dmd2", "distillation.batch": 128}. The same call resumes an interrupted run. In the main thread, Ctrl-C stops
    training after the current step and saves the state. In another thread, training ends with the process, without saving.

    Raises RequestError, before anything is trained, if recipe, settings, data and teacher do not fit together.
    """
    from uni_instruct.train.pipeline import train
    from uni_instruct.train.recipe import load_recipe

    overrides = [f"{key}={_text(value)}" for key, value in (settings or {}).items()]
    return train(load_recipe(str(recipe), overrides), Path(out))


def _text(value: object) -> str:
    """The value as YAML text: strings unchanged, everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
