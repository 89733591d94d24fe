"""Which generators a server has, and what requests call them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from uni_instruct.bundle import CONFIG, default_generator, shipped_generators
from uni_instruct.errors import RequestError
from uni_instruct.files import JSON_ERRORS
from uni_instruct.hub import is_on_hub

# 'small=runs/small/generator': a name of one's own before the source.
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)


def default_sources() -> tuple[str, ...]:
    """Every generator that ships with this package; the one that is served where a request names none comes first."""
    return tuple(dict.fromkeys([default_generator(), *shipped_generators()]))


def split_sources(text: str) -> list[str]:
    """The sources of UNI_INSTRUCT_BUNDLE: separated by commas, or a JSON list, where a path has a comma in it."""
    try:
        listed = json.loads(text) if text.lstrip().startswith("[") else text.split(",")
    except ValueError:
        listed = [text]  # a folder whose name begins with a bracket
    return [part.strip() for part in map(str, listed) if part.strip()]


def sources_by_name(sources: Sequence[str]) -> dict[str, str]:
    """Name -> source, in their order. A source is a folder, a shipped generator's name or a hub's address, or NAME=one of them.

    Without a name of its own it is called what its config.json says, or as its folder where that cannot be read.
    Raises RequestError where two have one name, or there is none.
    """
    found: dict[str, str] = {}
    for text in sources:
        name, source = _named(text)
        if name in found:
            raise RequestError(
                f"{found[name]} and {source} are both called {name}",
                remedy=f"give one a name of its own: other={source}",
                param="bundle",
            )
        found[name] = source
    if not found:
        raise RequestError("no generator is named", remedy=f"name one, such as {default_generator()}", param="bundle")
    return found


def _named(text: str) -> tuple[str, str]:
    match = _NAMED.fullmatch(text)
    # A folder may have an equals sign in its name.
    if match and not Path(text).exists():
        return match[1], match[2]
    return _usable(_own_name(text)), text


def _own_name(source: str) -> str:
    path = Path(source)
    if not is_on_hub(source):
        try:
            return str(json.loads((path / CONFIG).read_text())["name"])
        except (OSError, *JSON_ERRORS, KeyError, TypeError):
            pass  # loading it will say what is wrong; until then it needs something to be called
    return path.name.partition("@")[0]


def _usable(name: str) -> str:
    """The name as it can stand in a path of a URL and before an equals sign."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
