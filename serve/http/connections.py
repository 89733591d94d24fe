"""Limits on connections that uvicorn lacks: a timeout for a request to arrive, and a maximum number of open connections.

A request that arrives in one piece costs no timer of its own: one is started for each new connection, not for each request.
"""

import asyncio
import contextlib
import json
import logging
import resource
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from uni_instruct.errors import UniInstructError
from uni_instruct.serve.batching.deadlines import Deadlines
from uni_instruct.serve.errors import SlowRequestError, TooManyConnectionsError, error_body, error_headers
from uni_instruct.serve.http.disconnects import CONNECTION
from uni_instruct.serve.metrics import ServerMetrics
from uni_instruct.serve.settings import Settings

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

# File descriptors that a worker needs besides its connections: sockets, logs, the bundle, those of the engine's runtime.
_RESERVED_FILES = 128
_MIN_FILES = 24


def limit_connections(server: "uvicorn.Server", settings: Settings, metrics: ServerMetrics) -> None:
    """Set the limits of the settings on a server that does not listen yet. Refusals are counted under route 'connection'."""
    limit = _allowed_connections(settings.connections)
    server.config.timeout_keep_alive = settings.keep_alive_s  # type: ignore[assignment]
    server.config.http_protocol_class = _limited_protocol(server.config.http_protocol_class, settings, limit, metrics)


def _allowed_connections(wanted: int) -> int:
    """Return how many connections to allow: `wanted`, or fewer if this process may not open that many files.

    The soft limit of open files is first raised as far as the hard limit allows. A process without a free file descriptor
    cannot accept any client, while a limit of our own lets idle connections be closed to make room.
    """
    files = wanted + _RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        soft = files if hard == resource.RLIM_INFINITY else min(files, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= files:
        return wanted
    # With a common limit such as 1024 only the reserve is lost. With a very small one, about half is left for connections.
    allowed = max(soft - _RESERVED_FILES, soft // 2 - _MIN_FILES, 3)
    if allowed < wanted:
        message = "this process may open only %d files (ulimit -n), so it allows %d connections instead of %d"
        logger.warning(message, soft, allowed, wanted)
    return min(allowed, wanted)


def _limited_protocol(protocol: type[Any], settings: Settings, limit: int, metrics: ServerMetrics) -> type[Any]:
    """Return uvicorn's protocol class with the limits added. Uvicorn creates one object of it for each connection.

    All connections of a server share the class attributes that are set here.
    """
    limits = {"receive_s": settings.receive_s, "limit": limit, "silent": {}}
    limits |= {"too_slow": _refusal(SlowRequestError(settings.receive_s), settings)}
    limits |= {"too_many": _refusal(TooManyConnectionsError(limit), settings)}
    limits |= {"refused": staticmethod(lambda status: metrics.count_answer("connection", status))}
    limits |= {"keep_alive_s": settings.keep_alive_s, "idle": Deadlines(lambda silent: silent.end())}
    return type("Bounded", (_LimitedProtocol, protocol), limits)


def _refusal(error: UniInstructError, settings: Settings) -> bytes:
    """Return the bytes of a complete answer to a request that never reaches the app.

    The request's origin is not known here, so pages of other origins may read the answer only if all origins are allowed.
    """
    body = json.dumps(error_body(error)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers |= error_headers(error) | ({"access-control-allow-origin": "*"} if "*" in settings.origins else {})
    status = HTTPStatus(error.http_status)
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


class _LimitedProtocol:
    """Base class placed before uvicorn's protocol class, whose methods it extends.

    silent: the connections that have no complete request in progress, oldest first (a dict as an ordered set). idle: closes
    connections that are unused for keep_alive_s. too_slow, too_many: the answers to refused requests. refused: counts such an
    answer by its status.
    """

    receive_s: float
    keep_alive_s: float
    limit: int
    too_slow: bytes
    too_many: bytes
    refused: Callable[[int], None]
    silent: dict[Any, None]
    idle: Deadlines[Any]
    # Attributes of uvicorn's protocol, declared for the type checker.
    access_log: bool
    access_logger: logging.Logger
    connections: set[Any]
    cycle: Any
    flow: Any
    parser: Any
    pipeline: deque[Any]
    scope: Any
    server_state: Any
    loop: asyncio.AbstractEventLoop
    transport: Any

    # Called when the client disconnects while a request is in progress (http/disconnects.py).
    on_lost: Callable[[], None] | None = None
    _receive_timeout: asyncio.TimerHandle | None = None
    _stall_timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        # Uvicorn formats a log line for every answer if its access log is on, even if the logger would then drop the line.
        self.access_log = self.access_log and self.access_logger.isEnabledFor(logging.INFO)
        if len(self.connections) > self.limit and not _make_room(self.silent):
            self.refused(503)
            transport.write(self.too_many)
            transport.close()
            return
        self.silent[self] = None
        self._start_receive_timeout()

    def data_received(self, data: bytes) -> None:
        self.idle.remove(self)
        super().data_received(data)  # type: ignore[misc]
        if self.transport.get_protocol() is not self:
            self._release_to_websocket()
            return
        cycle = self.cycle
        if cycle is not None:
            cycle.scope[CONNECTION] = self  # in time: the app's task was only just created and has not started yet
        # True while a request is incomplete: its headers or its body are still arriving.
        if cycle is None or cycle.response_complete or cycle.more_body:
            self._start_receive_timeout()
        else:
            self._cancel_receive_timeout()
            self.silent.pop(self, None)

    def on_response_complete(self) -> None:
        if self.pipeline or self.transport.is_closing():
            # Uvicorn's method starts the next of several pipelined requests.
            super().on_response_complete()  # type: ignore[misc]
            if not self.transport.is_closing():
                self.silent[self] = None
            return
        # The same as uvicorn's method, except for its keep-alive timer, which is created and cancelled for every request.
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self.silent[self] = None
        self.idle.add(self, self.loop.time() + self.keep_alive_s)

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._start_stall_timeout()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._cancel_stall_timeout()
        super().resume_writing()  # type: ignore[misc]

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_receive_timeout()
        self._cancel_stall_timeout()
        self.idle.remove(self)
        self.silent.pop(self, None)
        super().connection_lost(exc)  # type: ignore[misc]
        # A request's scope refers to this connection (CONNECTION), and this connection to the scope. Break the cycle here: the
        # garbage collector runs only once in thousands of connections, and until then they would hold ten megabytes.
        self.scope = self.cycle = None
        self.pipeline.clear()
        if self.on_lost is not None:
            self.on_lost()

    def _start_receive_timeout(self) -> None:
        # Timed from the first byte, not from the latest: otherwise a client that sends one byte a second could go on forever.
        if self._receive_timeout is None:
            self._receive_timeout = self.loop.call_later(self.receive_s, self._too_slow)

    def _cancel_receive_timeout(self) -> None:
        if self._receive_timeout is not None:
            self._receive_timeout.cancel()
            self._receive_timeout = None

    def end(self) -> None:
        """Close an idle connection once its client has read the last answer, or has read nothing of it for keep_alive_s."""
        self.transport.close()
        if self._stall_timeout is None and self.transport.get_write_buffer_size():
            self._start_stall_timeout()

    def _start_stall_timeout(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._stall_timeout = self.loop.call_later(self.keep_alive_s, self._check_stall, left)

    def _check_stall(self, than: int) -> None:
        if self.transport.get_write_buffer_size() < than:
            self._start_stall_timeout()
        else:
            # The client has read nothing for keep_alive_s. Waiting longer would keep its answer in memory without end.
            self.transport.abort()

    def _cancel_stall_timeout(self) -> None:
        if self._stall_timeout is not None:
            self._stall_timeout.cancel()
            self._stall_timeout = None

    def _release_to_websocket(self) -> None:
        """Release the connection to uvicorn's websocket protocol. No method of this object is called for it afterwards."""
        self._cancel_receive_timeout()
        self.silent.pop(self, None)
        self.parser = self.scope = self.cycle = None

    def _too_slow(self) -> None:
        self.silent.pop(self, None)
        if not self.transport.is_closing():
            # Not in the middle of another answer, which may have started before all of its request's body arrived.
            if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
                self.refused(408)
                self.transport.write(self.too_slow)
            self.transport.close()


def _make_room(silent: dict[Any, None]) -> bool:
    """Close the connection that has been without a request for longest. Return False if all have a request in progress."""
    # Prefer one whose answer has been read completely. The others are aborted, because `close` would wait for the reading.
    oldest = next((one for one in silent if not one.transport.get_write_buffer_size()), next(iter(silent), None))
    if oldest is None:
        return False
    del silent[oldest]
    if oldest.transport.get_write_buffer_size():
        oldest.transport.abort()
    else:
        oldest.transport.close()
    return True
