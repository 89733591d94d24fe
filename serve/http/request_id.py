"""X-Request-ID: taken from the client where it is a sensible one, made where it is not, and given back with every answer."""

import random
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uni_instruct.serve.http.headers import header_of

_NAME = b"x-request-id"
# Where handlers and logs find it.
SCOPE_KEY = "uni_instruct.request_id"
# What proxies and clients make: UUIDs, ULIDs, trace ids. Anything else might write lines of its own into a log.
_SENSIBLE = re.compile(rb"[A-Za-z0-9._:+/=-]{1,128}")


def with_request_id(app: ASGIApp) -> ASGIApp:
    """The app, with the id in the scope of every request and in its answer."""

    async def with_id(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        given = header_of(scope, _NAME) or b""
        request_id = given.decode("latin-1") if _SENSIBLE.fullmatch(given) else f"{random.getrandbits(128):032x}"
        scope[SCOPE_KEY] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (_NAME, request_id.encode())]
            await send(message)

        await app(scope, receive, send_with_id)

    return with_id
