"""What every request passes before it reaches a route, BentoML's own included: CORS, the API key, the limit of the body."""

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

# Open without a key: orchestrators probe them without one, and they say nothing but yes or no.
HEALTH_PATHS = ("/livez", "/readyz", "/healthz")
# Answered until the end: who watches a server that stops must not take it for dead.
_ALWAYS_ANSWERED = (*HEALTH_PATHS, "/metrics")
# What a page of another origin may read of an answer.
_EXPOSED = (
    *("X-Seeds", "X-Class-Ids", "X-Model", "X-Engine", "X-Engines-Refused"),
    *("X-Request-ID", "Server-Timing", "Retry-After", "ETag"),
)
_PASSED = "uni_instruct.passed"


class RequestMiddleware:
    """One pass for all of them, before BentoML's routes and ours; a request that has passed is not asked again.

    direct: (method, path) -> the app that answers it. Routers and middlewares of two frameworks stand between here and there,
    and would take longer than the rest of a request.
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
        # A span is made by a middleware of BentoML's, further in.
        self._direct = {} if settings.tracing or direct is None else direct
        self._guarded = with_request_id(_with_cors(self._guard, settings))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI connection."""
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
            # An open page holds a connection for as long as it is open: stopping does not wait for it.
            await self._limited(app, scope, receive, send)
        else:
            with self._stopping.request:
                await self._limited(app, scope, receive, send)

    def _refusal(self, scope: Scope, path: str) -> UniInstructError | None:
        """Why the request goes no further, None where it does. The cheapest reasons come first."""
        if self._stopping.begun and path not in _ALWAYS_ANSWERED:
            return StoppingError()
        # A browser's preflight request (OPTIONS) never carries the key.
        needs_key = self._settings.keys and scope.get("method") != "OPTIONS" and path not in self._open
        # As bytes: which characters they stand for is not the header's to say.
        if needs_key and not is_one_of(given_key(header_of(scope, b"authorization") or b""), self._settings.keys):
            return UnauthorizedError("the API key is missing or wrong", remedy="send the header 'Authorization: Bearer KEY'")
        announced = header_of(scope, b"content-length") or b"0"
        if announced.isdigit() and (len(announced) > 18 or int(announced) > self._settings.max_body_bytes):
            return self._too_large()
        return None

    async def _limited(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        if header_of(scope, b"transfer-encoding") is None and header_of(scope, b"content-length") is not None:
            # HTTP ends the body where it was announced to end.
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
        # The rest of the body is not read: what follows on this connection would be taken for the next request.
        # And a client whose server stops should open its next connection to another one.
        if error.http_status != UnauthorizedError.http_status:
            response.headers["Connection"] = "close"
        await response(scope, receive, send)


def put_request_middleware_first(app: Starlette, *, tracing: bool) -> None:
    """Rearranges the middleware of BentoML's app, in which ours stands: the guards come first of all, and two go.

    Its timeout keeps a timer for every request until that would have ended, and answers without CORS headers, while the server
    has a timeout of its own. A span costs as much as the rest of a request's Python, also where it is sent nowhere.
    """
    unwanted = {"TimeoutMiddleware"} if tracing else {"TimeoutMiddleware", "OpenTelemetryMiddleware"}
    kept = [middleware for middleware in app.user_middleware if getattr(middleware.cls, "__name__", "") not in unwanted]
    guards = next((middleware for middleware in kept if middleware.cls is RequestMiddleware), None)
    app.user_middleware = [middleware for middleware in kept if middleware.cls is not RequestMiddleware]
    # What runs now, the lifespan, goes on in the stack as it was.
    inner = app.build_middleware_stack()
    app.middleware_stack = inner if guards is None else guards.cls(inner, *guards.args, **guards.kwargs)


def add_prefix(scope: Scope, prefix: str) -> None:
    """Makes the path what ASGI wants it to be behind a proxy: with the prefix, which the proxy may have cut off."""
    if prefix:
        scope["root_path"] = prefix
        if scope["path"] != prefix and not scope["path"].startswith(f"{prefix}/"):
            scope["path"] = prefix + scope["path"]


def route_path(scope: Scope) -> str:
    """The path as the routes name it, without a proxy's prefix."""
    return str(scope["path"]).removeprefix(scope.get("root_path", "")) or "/"


def _with_cors(app: ASGIApp, settings: Settings) -> ASGIApp:
    """The app, with CORS headers on all of its answers. Outside of the other guards: a page may read their errors too."""
    if settings.cors_origins is None:
        return app
    return CORSMiddleware(
        app,
        allow_origins=settings.origins,
        allow_methods=["GET", "POST"],
        # Any: OpenAI's client in a browser sends ten of its own. None of them opens anything here, and there are no cookies.
        allow_headers=["*"],
        expose_headers=_EXPOSED,
    )


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
