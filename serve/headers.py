"""Headers of a request as ASGI hands them over: bytes, names in lower case."""

from starlette.types import Scope


def header_of(scope: Scope, name: bytes) -> bytes | None:
    """The first header of that name, None where there is none. Starlette's Headers decode all of them for each look."""
    for given, value in scope["headers"]:
        if given == name:
            return bytes(value)
    return None
