"""X-Request-ID: taken from the request if it is well-formed, otherwise generated, and returned with every answer."""

import random
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uni_instruct.serve.http.headers import header_of

_NAME = b"x-request-id"
# The key of the id in a request's ASGI scope, for handlers and the access log.
SCOPE_KEY = "uni_instruct.request_id"
# Fits the ids of proxies and clients: UUIDs, ULIDs, trace ids. Other text might add forged lines to a log.
_SENSIBLE = re.compile(rb"[A-Za-z0-9._:+/=-]{1,128}")


def with_request_id(app: ASGIApp) -> ASGIApp:
    """Wrap the app so that every request has the id in its scope, and every answer in its X-Request-ID header."""

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
