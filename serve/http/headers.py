"""Read single headers from ASGI's list of them, in which names and values are bytes and the names are in lower case."""

from collections.abc import Iterable

from starlette.types import Scope


def header_of(scope: Scope, name: bytes) -> bytes | None:
    """Return the value of a request's first header of that name, or None."""
    return value_of(scope["headers"], name)


def value_of(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """Return the value of the first header of that name, or None. Starlette's `Headers` would decode all of them each time."""
    for given, value in headers:
        if given == name:
            return bytes(value)
    return None
