"""What every request passes before it reaches a route, BentoML's own included: the API key and the limit of the body."""

import base64
import binascii
import hmac

from prometheus_client import Counter
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uni_instruct.serve.errors import BodyTooLargeError, UnauthorizedError
from uni_instruct.serve.responses import error_response

# Open without a key: orchestrators probe them without one, and they say nothing but yes or no.
HEALTH_PATHS = ("/livez", "/readyz", "/healthz")


class ApiKeyMiddleware:
    """Answers 401 without the key, except for health checks and preflight requests. Without a key all is open.

    The key comes as 'Authorization: Bearer KEY', or as the password of basic authentication, which browsers ask for.
    """

    def __init__(self, app: ASGIApp, key: str | None, requests: Counter):
        self.app = app
        self._requests = requests
        self._key = key.encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        needs_key = self._key is not None and scope["type"] in ("http", "websocket")
        # A browser's preflight request (OPTIONS) never carries the key.
        if needs_key and scope.get("method") != "OPTIONS" and scope["path"] not in HEALTH_PATHS:
            given = _given_key(Headers(scope=scope).get("authorization", ""))
            # In constant time: a comparison that stops at the first difference would give the key away letter by letter.
            if not hmac.compare_digest(given, self._key or b""):
                error = UnauthorizedError(
                    "the API key is missing or wrong", remedy="send the header 'Authorization: Bearer KEY'"
                )
                self._requests.labels("guard", "401").inc()
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimitMiddleware:
    """Answers 413 to a body of more than limit_bytes, whether its length is announced or not."""

    def __init__(self, app: ASGIApp, limit_bytes: int, requests: Counter):
        self.app = app
        self._requests = requests
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._limit_bytes:
            await self._refuse()(scope, receive, send)
            return
        # A chunked body announces no length, and an announced one may be a lie.
        body = _CountedBody(self._limit_bytes, receive, send)
        await self.app(scope, body.receive, body.send)
        if body.exceeded and not body.responded:
            await self._refuse()(scope, receive, send)

    def _refuse(self) -> JSONResponse:
        self._requests.labels("guard", "413").inc()
        error = BodyTooLargeError(f"the body is larger than {self._limit_bytes} bytes", remedy="ask for fewer images at once")
        response = error_response(error)
        # The rest of the body is not read: what follows on this connection would be taken for the next request.
        response.headers["Connection"] = "close"
        return response


class _CountedBody:
    """Passes messages on until the body is too long; from then on the app sees a client that has left.

    Once the app has begun to respond, its response is passed on to the end.
    """

    def __init__(self, limit_bytes: int, receive: Receive, send: Send):
        self.exceeded = self.responded = False
        self._left = limit_bytes
        self._receive, self._send = receive, send

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        self.exceeded = self.exceeded or self._left < 0
        return {"type": "http.disconnect"} if self.exceeded else message

    async def send(self, message: Message) -> None:
        if not self.exceeded or self.responded:
            self.responded = True
            await self._send(message)


def _given_key(header: str) -> bytes:
    """The key in an Authorization header, empty where it holds none."""
    scheme, _, credentials = header.partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
