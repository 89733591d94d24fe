"""A user's own functions, imported by name: 'package.module:function', or 'file.py:function' for a file."""

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from uni_instruct.errors import RequestError


def is_importable_name(text: str) -> bool:
    """Whether the text has the form module:function or file.py:function."""
    # No brackets before the colon, so that an expression such as f(r)[0:n] is not taken for a name.
    return re.fullmatch(r"[^:()]+:[A-Za-z_]\w*", text) is not None


def import_named(text: str, *, param: str) -> Callable[..., Any]:
    """Import the function of that name. The user's module runs once. Raises RequestError if module or function is not found.

    param: the option or recipe key that the error names.
    """
    if not is_importable_name(text):
        raise RequestError(
            f"{param} '{text}' is not the name of a function", remedy="write module:function or file.py:function", param=param
        )
    source, _, name = text.rpartition(":")
    try:
        module = _import_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:  # the user's own module may raise anything
        reason = " ".join(str(error).split())
        raise RequestError(
            f"{param} '{text}' cannot be imported: {reason}",
            remedy="give a module on Python's path, or file.py:function",
            param=param,
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RequestError(f"{param} '{text}': {source} has no function {name}", remedy="correct the name", param=param)
    found: Callable[..., Any] = function
    return found


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    return _executed(file.resolve(), file.stat().st_mtime_ns)


# Cached, because a recipe is built several times before a run starts, and the user's file may be slow to execute or load a
# network. The modification time is part of the cache key, so that a notebook gets the file's latest version.
@functools.cache
def _executed(file: Path, changed_ns: int) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_user_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look up the module of a class here
    spec.loader.exec_module(module)
    return module
