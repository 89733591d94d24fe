"""The access log: one line of JSON on standard output for every request."""

import contextlib
import json
import sys
import time
from datetime import UTC, datetime

from starlette.datastructures import Headers
from starlette.types import Message, Scope, Send

from uni_instruct.serve.http.request_id import SCOPE_KEY


def logged(scope: Scope, send: Send) -> Send:
    """Return a `send` that passes messages on and writes the log line after the last message of the answer."""
    start = time.perf_counter()
    status, size = 0, 0
    answer = Headers()

    async def counted(message: Message) -> None:
        nonlocal status, size, answer
        if message["type"] == "http.response.start":
            status, answer = message["status"], Headers(raw=message.get("headers", []))
        await send(message)
        if message["type"] == "http.response.body":
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                _write(scope, status, size, 1e3 * (time.perf_counter() - start), answer)

    return counted


def _write(scope: Scope, status: int, size: int, total_ms: float, answer: Headers) -> None:
    asked = Headers(scope=scope)
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": scope.get(SCOPE_KEY),
        "client": scope["client"][0] if scope.get("client") else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "bytes": size,
        "total_ms": round(total_ms, 2),
        "timing": answer.get("server-timing"),
        "engine": answer.get("x-engine"),
        "user_agent": asked.get("user-agent"),
    }
    # A single write per line, so that the lines of several workers do not mix. JSON escapes line breaks in a client's path.
    # The log's reader may have closed the pipe, or the disk may be full. That must not make a request fail.
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
