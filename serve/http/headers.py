"""Headers as ASGI hands them over: bytes, names in lower case."""

from collections.abc import Iterable

from starlette.types import Scope


def header_of(scope: Scope, name: bytes) -> bytes | None:
    """A request's first header of that name, None where there is none."""
    return value_of(scope["headers"], name)


def value_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first of that name, None where there is none. Starlette's Headers decode all of them for each look."""
    for given, value in headers:
        if given == name:
            return bytes(value)
    return None
