"""Middleware for every request, those to BentoML's own routes included: CORS, the API key, the limit of the body's size."""

from collections.abc import Mapping

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uni_instruct.errors import UniInstructError
from uni_instruct.serve.api_keys import given_key, is_one_of
from uni_instruct.serve.errors import BodyTooLargeError, StoppingError, UnauthorizedError, error_response
from uni_instruct.serve.http.access_log import logged
from uni_instruct.serve.http.headers import header_of
from uni_instruct.serve.http.request_id import with_request_id
from uni_instruct.serve.http.single_write import single_write
from uni_instruct.serve.metrics import ServerMetrics
from uni_instruct.serve.process.shutdown import GracefulShutdown
from uni_instruct.serve.settings import Settings

# Open without a key: orchestrators probe them without one, and the answers hold only states and names of models.
HEALTH_PATHS = ("/livez", "/readyz", "/healthz")
# Answered until the process ends, so that monitoring can tell a server that is stopping from a dead one.
_ALWAYS_ANSWERED = (*HEALTH_PATHS, "/metrics")
# Headers of an answer that a page of another origin may read (Access-Control-Expose-Headers).
_EXPOSED = (
    *("X-Seeds", "X-Class-Ids", "X-Model", "X-Engine", "X-Engines-Refused"),
    *("X-Request-ID", "Server-Timing", "Retry-After", "ETag"),
)
# The key in a request's ASGI scope that marks it as checked.
_PASSED = "uni_instruct.passed"


class RequestMiddleware:
    """Checks every request once, before BentoML's routes and ours. A request that has been checked is not checked again.

    direct: (method, path) -> the ASGI app that answers it. Requests to these paths skip the routers and middlewares of two
    frameworks, which would take longer than the rest of the request.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: ServerMetrics,
        stopping: GracefulShutdown,
        direct: Mapping[tuple[str, str], ASGIApp] | None = None,
    ):
        self._settings, self._metrics, self._stopping = settings, metrics, stopping
        self._open = (*HEALTH_PATHS, "/metrics") if settings.metrics_open else HEALTH_PATHS
        self._app = app
        # With tracing, every request must pass BentoML's middleware further in, because that one creates the span.
        self._direct = {} if settings.tracing or direct is None else direct
        self._guarded = with_request_id(_with_cors(self._guard, settings))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "lifespan":
            put_request_middleware_first(scope["app"], tracing=self._settings.tracing)
        if scope["type"] == "lifespan" or _PASSED in scope:
            await self._app(scope, receive, send)
            return
        scope[_PASSED] = True
        add_prefix(scope, self._settings.prefix)
        send = single_write(send)
        if self._settings.access_log and scope["type"] == "http":
            send = logged(scope, send)
        await self._guarded(scope, receive, send)

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        error = self._refusal(scope, path)
        if error is not None:
            await self._refuse(error, scope, receive, send)
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        app = self._direct.get((scope["method"], path), self._app)
        if path.startswith("/ui") or path in _ALWAYS_ANSWERED:
            # Not counted as in flight: a page of the demo keeps a connection open as long as it is open itself.
            await self._limited(app, scope, receive, send)
        else:
            with self._stopping.request:
                await self._limited(app, scope, receive, send)

    def _refusal(self, scope: Scope, path: str) -> UniInstructError | None:
        """Return the error that refuses the request, or None if it may pass. The cheapest checks come first."""
        if self._stopping.begun and path not in _ALWAYS_ANSWERED:
            return StoppingError()
        # A browser's preflight request (OPTIONS) never carries the key.
        needs_key = self._settings.keys and scope.get("method") != "OPTIONS" and path not in self._open
        # Compared as bytes, because a header does not say which text encoding it uses.
        if needs_key and not is_one_of(given_key(header_of(scope, b"authorization") or b""), self._settings.keys):
            return UnauthorizedError("the API key is missing or wrong", remedy="send the header 'Authorization: Bearer KEY'")
        announced = header_of(scope, b"content-length") or b"0"
        if announced.isdigit() and (len(announced) > 18 or int(announced) > self._settings.max_body_bytes):
            return self._too_large()
        return None

    async def _limited(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        if header_of(scope, b"transfer-encoding") is None and header_of(scope, b"content-length") is not None:
            # Nothing to count: the server reads no more than Content-Length bytes, and `_refusal` has checked that number.
            await app(scope, receive, send)
            return
        body = _CountedBody(self._settings.max_body_bytes, receive, send)
        await app(scope, body.receive, body.send)
        if body.exceeded and not body.responded:
            await self._refuse(self._too_large(), scope, receive, send)

    def _too_large(self) -> BodyTooLargeError:
        limit = self._settings.max_body_bytes
        return BodyTooLargeError(f"the body is larger than {limit} bytes", remedy="ask for fewer images at once")

    async def _refuse(self, error: UniInstructError, scope: Scope, receive: Receive, send: Send) -> None:
        self._metrics.count_answer("guard", error.http_status)
        response = error_response(error)
        # The rest of the body is not read, so on an open connection it would be taken for the next request. Besides, a client
        # of a server that is stopping should open its next connection to another server.
        if error.http_status != UnauthorizedError.http_status:
            response.headers["Connection"] = "close"
        await response(scope, receive, send)


def put_request_middleware_first(app: Starlette, *, tracing: bool) -> None:
    """Rebuild the middleware stack of BentoML's app with RequestMiddleware outermost, and without two of BentoML's own.

    TimeoutMiddleware is removed: it keeps a timer for every request until the timeout, even for one that is finished, and
    answers without CORS headers, and the server has a timeout of its own. OpenTelemetryMiddleware is removed unless `tracing`:
    a span costs as much as all other Python code of a request, even if it is not exported.
    """
    unwanted = {"TimeoutMiddleware"} if tracing else {"TimeoutMiddleware", "OpenTelemetryMiddleware"}
    kept = [middleware for middleware in app.user_middleware if getattr(middleware.cls, "__name__", "") not in unwanted]
    guards = next((middleware for middleware in kept if middleware.cls is RequestMiddleware), None)
    app.user_middleware = [middleware for middleware in kept if middleware.cls is not RequestMiddleware]
    # This runs during the lifespan call, which finishes in the old stack. Requests that come later use the new one.
    inner = app.build_middleware_stack()
    app.middleware_stack = inner if guards is None else guards.cls(inner, *guards.args, **guards.kwargs)


def add_prefix(scope: Scope, prefix: str) -> None:
    """Set root_path and path as ASGI requires behind a proxy: path includes the prefix, which the proxy may have removed."""
    if prefix:
        scope["root_path"] = prefix
        if scope["path"] != prefix and not scope["path"].startswith(f"{prefix}/"):
            scope["path"] = prefix + scope["path"]


def route_path(scope: Scope) -> str:
    """Return the path of a request as the routes name it, without a proxy's prefix."""
    return str(scope["path"]).removeprefix(scope.get("root_path", "")) or "/"


def _with_cors(app: ASGIApp, settings: Settings) -> ASGIApp:
    """Wrap the app so that all of its answers have CORS headers. It wraps the other checks: pages can read their errors."""
    if settings.cors_origins is None:
        return app
    return CORSMiddleware(
        app,
        allow_origins=settings.origins,
        allow_methods=["GET", "POST"],
        # Any header: OpenAI's client in a browser sends ten of its own. No header gives access without the key, and the server
        # uses no cookies.
        allow_headers=["*"],
        expose_headers=_EXPOSED,
    )


class _CountedBody:
    """Passes ASGI messages on and counts the bytes of the body. After limit_bytes the app gets http.disconnect instead.

    If the app has already started its response by then, the response is still passed on to the end.
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
