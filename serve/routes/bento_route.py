"""POST /generate, BentoML's own route, made to behave as the other routes do: the same fields, errors and metrics."""

import logging
from contextvars import ContextVar

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uni_instruct.errors import UniInstructError
from uni_instruct.serve.errors import EncodingError, error_response
from uni_instruct.serve.http.body import read_body
from uni_instruct.serve.http.middleware import route_path
from uni_instruct.serve.metrics import ServerMetrics
from uni_instruct.serve.routes.schema import REMEDIES, Seed, ShortErrors, parse_model

PATH = "/generate"
_REPLACED_HEADERS = (b"content-length", b"content-encoding", b"content-type", b"transfer-encoding")
# The logger to which BentoML writes the traceback of everything that an API method raises.
_BENTOML_LOG = "bentoml._internal.server.http_app"
# The error that the method raised, for the middleware around it. BentoML itself passes on only the error's text.
_raised: ContextVar[list[UniInstructError]] = ContextVar("raised")


class BentoRequest(BaseModel):
    """The body of POST /generate: the fields of GenerateRequest that do not concern files."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seeds: ShortErrors[Seed] | None = Field(None, description="One image for each.")
    num_images: int | None = Field(None, description="Instead of seeds: the number of images.")
    class_ids: ShortErrors[int] | None = Field(None, description="Class ids: one for all images, or one for each.")
    classes: ShortErrors[str] | None = Field(None, description="Class names, instead of class_ids.")
    model: str | None = Field(None, description="Name of the generator, as GET /v1/models lists it. By default the first.")


def note_error(error: UniInstructError) -> None:
    """Make this error the answer, in the JSON shape of all errors. The API method calls this before it raises."""
    _raised.get([]).append(error)


def drop_refusals_from_log() -> None:
    """Keep BentoML from logging a traceback for a refused request (status below 500), whose answer says what is wrong."""
    logging.getLogger(_BENTOML_LOG).addFilter(_is_no_refusal)


def _is_no_refusal(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    cause = error.__cause__ if error else None
    return not (isinstance(cause, UniInstructError) and cause.http_status < 500)


class BentoRouteMiddleware:
    """Checks the body of POST /generate before BentoML reads it, and answers errors in the JSON shape of all routes."""

    def __init__(self, app: ASGIApp, limit_bytes: int, metrics: ServerMetrics):
        self.app = app
        self._limit_bytes = limit_bytes
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or route_path(scope) != PATH or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._checked_body(Request(scope, receive))
        except UniInstructError as error:
            self._count(error.http_status)
            await error_response(error)(scope, receive, send)
            return
        except ClientDisconnect:
            self._count(499)
            return
        await self._run(scope, body, receive, send)

    async def _checked_body(self, request: Request) -> bytes:
        media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise EncodingError(f"content type {media_type[:60]!r} is not supported", remedy="send application/json")
        body = await read_body(request, self._limit_bytes)
        wanted = parse_model(BentoRequest, body, _REMEDIES, example='{"seeds": [7]}')
        values = wanted.model_dump(exclude_none=True)
        if wanted.seeds is not None:  # BentoML's own check accepts only integers, no strings of digits
            values["seeds"] = [int(seed) for seed in wanted.seeds]
        return BentoRequest(**values).model_dump_json(exclude_none=True).encode()

    async def _run(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Send BentoML's answer to the checked body, or the error that the API method noted."""
        raised: list[UniInstructError] = []
        token = _raised.set(raised)
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        status = 0

        async def receive_checked() -> Message:
            return given.pop() if given else await receive()

        async def send_in_our_shape(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            if status < 400:
                await send(message)

        headers = [(name, value) for name, value in Headers(scope=scope).raw if name.lower() not in _REPLACED_HEADERS]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        try:
            await self.app({**scope, "headers": headers}, receive_checked, send_in_our_shape)
        finally:
            _raised.reset(token)
        self._count(raised[0].http_status if raised else status)
        if status >= 400:
            failed = UniInstructError("internal error", remedy="see the server's log")
            await error_response(raised[0] if raised else failed)(scope, receive, send)

    def _count(self, status: int) -> None:
        self._metrics.count_answer(PATH, status)


_REMEDIES = {name: REMEDIES[name] for name in BentoRequest.model_fields}
