"""The server's own errors, in addition to those of the core: each with its HTTP status, and the JSON body they all share."""

from collections.abc import Sequence

from starlette.responses import JSONResponse

from uni_instruct.errors import RequestError, UniInstructError


class UnauthorizedError(RequestError):
    """No API key, or a wrong one."""

    http_status = 401


class NotFoundError(RequestError):
    """Nothing is served under that path."""

    http_status = 404


class UnknownModelError(NotFoundError):
    """No generator of that name is served."""

    code = "model_not_found"

    def __init__(self, name: str, names: Sequence[str]):
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        super().__init__(f"no model {shown!r} is served", remedy=f"choose one of {', '.join(names)}", param="model")


class MethodError(RequestError):
    """The path exists, but not for that method."""

    http_status = 405


class SlowRequestError(RequestError):
    """The request did not arrive in time."""

    http_status = 408

    def __init__(self, receive_s: float):
        super().__init__(f"the request did not arrive completely within {receive_s:g} s", remedy="send it again without pauses")


class BodyTooLargeError(RequestError):
    """The body is larger than the server reads."""

    http_status = 413


class EncodingError(RequestError):
    """The body has a content type or encoding that the server does not read."""

    http_status = 415


class BusyError(UniInstructError):
    """Too much is waiting already. There will probably be room in retry_after_s seconds."""

    http_status = 429

    def __init__(self, problem: str, retry_after_s: int):
        super().__init__(problem, remedy=f"try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class QueueFullError(BusyError):
    """The queue has no room for that many images."""

    def __init__(self, queued: int, limit: int, retry_after_s: int):
        problem = f"the queue has no room for this request: {queued} of at most {limit} images are waiting"
        super().__init__(problem, retry_after_s)


class TooManyComparisonsError(BusyError):
    """As many comparisons of the demo run or wait as are allowed."""

    def __init__(self, comparisons: int, retry_after_s: int):
        super().__init__(f"{comparisons} comparisons are running or waiting already", retry_after_s)


class EngineFailedError(UniInstructError):
    """The engine failed on one image even when it ran alone, or returned images of a wrong shape or type."""


class NotReadyError(UniInstructError):
    """The generator is loading, could not be loaded, or is being stopped."""

    http_status = 503


class StoppingError(NotReadyError):
    """The server is stopping. Clients should retry: another server, or this one after its restart, will answer."""

    def __init__(self) -> None:
        super().__init__("the server is stopping", remedy="try again in a second, or use another server")


class TooManyConnectionsError(NotReadyError):
    """Every connection that the server allows has a request in progress."""

    code = "too_many_connections"

    def __init__(self, limit: int):
        super().__init__(f"all of the server's {limit} connections are in use", remedy="try again in a second")


class TimedOutError(UniInstructError):
    """The images were not finished before the timeout."""

    http_status = 504


# A message may quote a long value from the client. In a longer message the problem and its remedy would be hard to find.
_MAX_MESSAGE_LENGTH = 400

# HTTP status -> (type, code) of the error body, in the form that OpenAI's clients expect.
_OPENAI_ERRORS = {
    400: ("invalid_request_error", "invalid_value"),
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "body_too_large"),
    415: ("invalid_request_error", "unsupported_encoding"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "not_ready"),
    504: ("server_error", "timeout"),
}


def error_response(error: UniInstructError) -> JSONResponse:
    """Return the response for an error: its body as JSON, its HTTP status and its headers."""
    return JSONResponse(error_body(error), error.http_status, headers=error_headers(error))


def error_body(error: UniInstructError) -> dict[str, dict[str, str | None]]:
    """Return the body of an error: {"error": {message, type, param, code, remedy}}."""
    message = str(error)
    if len(message) > _MAX_MESSAGE_LENGTH:
        # Shorten the problem first: the remedy comes last in a message and must not be cut off.
        message = f"{error.problem[: _MAX_MESSAGE_LENGTH - 100]}...; {error.remedy[:_MAX_MESSAGE_LENGTH]}"
    type_, code = _OPENAI_ERRORS.get(error.http_status, _OPENAI_ERRORS[500])
    return {
        "error": {
            "message": message,
            "type": type_,
            "param": error.param,
            "code": getattr(error, "code", code),
            "remedy": error.remedy,
        }
    }


def error_headers(error: UniInstructError) -> dict[str, str]:
    """Return the headers that belong to an error: Retry-After or WWW-Authenticate, if any."""
    if isinstance(error, BusyError):
        return {"Retry-After": str(error.retry_after_s)}
    if isinstance(error, NotReadyError):
        return {"Retry-After": "1"}
    if isinstance(error, UnauthorizedError):
        # Basic, not Bearer: browsers ask the user for a password only for Basic. The demo page gets its API key this way.
        return {"WWW-Authenticate": 'Basic realm="uni-instruct"'}
    return {}
