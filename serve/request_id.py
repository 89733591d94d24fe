"""X-Request-ID: taken from the client where it is a sensible one, made where it is not, and given back with every answer."""

import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-ID"
# Where handlers and logs find it.
SCOPE_KEY = "uni_instruct.request_id"
# What proxies and clients make: UUIDs, ULIDs, trace ids. Anything else might write lines of its own into a log.
_SENSIBLE = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")


class RequestIdMiddleware:
    """Puts the id into the scope and into the answer. Where it stands twice, as in BentoML, the outer one decides."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] != "http" or SCOPE_KEY in scope:
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _SENSIBLE.fullmatch(given) else uuid.uuid4().hex
        scope[SCOPE_KEY] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)
