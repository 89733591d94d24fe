"""Which generators a server serves, and by which names requests call them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from uni_instruct.bundle import CONFIG, default_generator, shipped_generators
from uni_instruct.errors import RequestError
from uni_instruct.hub import is_on_hub
from uni_instruct.system.files import JSON_ERRORS

# 'small=runs/small/generator': the user's own name, then the source.
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)=(.+)", re.DOTALL)


def default_sources() -> tuple[str, ...]:
    """Return the names of all generators that ship with this package, the default one first."""
    return tuple(dict.fromkeys([default_generator(), *shipped_generators()]))


def split_sources(text: str) -> list[str]:
    """Split the text of UNI_INSTRUCT_BUNDLE into sources: a list separated by commas, or a JSON list if a path has a comma."""
    try:
        listed = json.loads(text) if text.lstrip().startswith("[") else text.split(",")
    except ValueError:
        listed = [text]  # not JSON after all: a folder whose name begins with a bracket
    return [part.strip() for part in map(str, listed) if part.strip()]


def sources_by_name(sources: Sequence[str]) -> dict[str, str]:
    """Return name -> source, in the given order.

    sources: each a folder, the name of a shipped generator or an address on the hub, or NAME=one of these. Without NAME=, the
    name is the one in the bundle's config.json, or that of the folder or repository if there is no readable config.json.
    Raises RequestError if two have the same name, or the list is empty.
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
    # An existing path takes precedence, because a folder's name may contain an equals sign.
    if match and not Path(text).exists():
        return match[1], match[2]
    return _usable(_own_name(text)), text


def _own_name(source: str) -> str:
    path = Path(source)
    if not is_on_hub(source):
        try:
            return str(json.loads((path / CONFIG).read_text())["name"])
        except (OSError, *JSON_ERRORS, KeyError, TypeError):
            pass  # loading will report what is wrong with it; it needs a name until then
    return path.name.partition("@")[0]


def _usable(name: str) -> str:
    """Return the name with other characters replaced, so that it can be part of a URL's path and precede an equals sign."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
