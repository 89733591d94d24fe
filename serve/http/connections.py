"""Bounds on connections, which uvicorn does not have: a deadline for a request to arrive, and a number that may be open.

A request that is complete costs nothing of it: there is one timer a connection, not one a request.
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

# Files beside connections that a worker holds: sockets, logs, the bundle, the runtime's own.
_OTHER_FILES = 128
_MIN_FILES = 24


def bound_connections(server: "uvicorn.Server", settings: Settings, metrics: ServerMetrics) -> None:
    """Gives the server, before it listens, the limits of the settings. What they refuse is counted as route 'connection'."""
    limit = _allowed_connections(settings.connections)
    server.config.timeout_keep_alive = settings.keep_alive_s  # type: ignore[assignment]
    server.config.http_protocol_class = _bounded(server.config.http_protocol_class, settings, limit, metrics)


def _allowed_connections(wanted: int) -> int:
    """As many as are wanted, or for how many this process may have files, whose limit is raised as far as the system lets it.

    Beyond its files a process refuses whoever comes, where with a limit the silent make room.
    """
    files = wanted + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        soft = files if hard == resource.RLIM_INFINITY else min(files, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft >= files:
        return wanted
    # A common limit is a thousand, for which the reserve is small; of a tiny one half is for connections.
    allowed = max(soft - _OTHER_FILES, soft // 2 - _MIN_FILES, 3)
    if allowed < wanted:
        logger.warning("this process may have %d files open, so %d connections, not %d (ulimit -n)", soft, allowed, wanted)
    return min(allowed, wanted)


def _bounded(protocol: type[Any], settings: Settings, limit: int, metrics: ServerMetrics) -> type[Any]:
    """Uvicorn's protocol, one object a connection, with the limits."""
    limits = {"receive_s": settings.receive_s, "limit": limit, "silent": {}}
    limits |= {"too_slow": _refusal(SlowRequestError(settings.receive_s), settings)}
    limits |= {"too_many": _refusal(TooManyConnectionsError(limit), settings)}
    limits |= {"refused": staticmethod(lambda status: metrics.count_answer("connection", status))}
    limits |= {"keep_alive_s": settings.keep_alive_s, "idle": Deadlines(lambda silent: silent.end())}
    return type("Bounded", (_Bounds, protocol), limits)


def _refusal(error: UniInstructError, settings: Settings) -> bytes:
    """A whole answer to a request that no app has seen. A page of another origin reads it only where all of them may."""
    body = json.dumps(error_body(error)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers |= error_headers(error) | ({"access-control-allow-origin": "*"} if "*" in settings.origins else {})
    status = HTTPStatus(error.http_status)
    lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


class _Bounds:
    """Stands before uvicorn's protocol. `silent` has the connections on which no request is under way, the oldest first."""

    receive_s: float
    keep_alive_s: float
    limit: int
    too_slow: bytes
    too_many: bytes
    refused: Callable[[int], None]
    silent: dict[Any, None]
    idle: Deadlines[Any]
    # Of uvicorn's own.
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

    # Called when the client leaves while a request is under way.
    on_lost: Callable[[], None] | None = None
    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        # Uvicorn puts a line together for every answer as soon as there is a log, also for one that would drop it.
        self.access_log = self.access_log and self.access_logger.isEnabledFor(logging.INFO)
        if len(self.connections) > self.limit and not _make_room(self.silent):
            self.refused(503)
            transport.write(self.too_many)
            transport.close()
            return
        self.silent[self] = None
        self._expect()

    def data_received(self, data: bytes) -> None:
        self.idle.remove(self)
        super().data_received(data)  # type: ignore[misc]
        if self.transport.get_protocol() is not self:
            self._hand_over()
            return
        cycle = self.cycle
        if cycle is not None:
            cycle.scope[CONNECTION] = self  # the app has not seen it yet: it runs in a task that has only been made
        if cycle is None or cycle.response_complete or cycle.more_body:
            self._expect()
        else:
            self._unexpect()
            self.silent.pop(self, None)

    def on_response_complete(self) -> None:
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()  # type: ignore[misc]
            if not self.transport.is_closing():
                self.silent[self] = None
            return
        # What uvicorn does, but for its timer: one that is made and cancelled with every request.
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self.silent[self] = None
        self.idle.add(self, self.loop.time() + self.keep_alive_s)

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._look_again()

    def resume_writing(self) -> None:
        if not self.transport.is_closing():
            self._forget_stall()
        super().resume_writing()  # type: ignore[misc]

    def connection_lost(self, exc: Exception | None) -> None:
        self._unexpect()
        self._forget_stall()
        self.idle.remove(self)
        self.silent.pop(self, None)
        super().connection_lost(exc)  # type: ignore[misc]
        # The requests have this connection in their scopes: what points at each other waits for the garbage collector, which
        # comes once in thousands of connections, and would hold ten megabytes of them.
        self.scope = self.cycle = None
        self.pipeline.clear()
        if self.on_lost is not None:
            self.on_lost()

    def _expect(self) -> None:
        # From the first byte on, not from the last: one byte a second would never end.
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.receive_s, self._too_slow)

    def _unexpect(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def end(self) -> None:
        """Closes the connection once its client has taken the last answer, or takes no more of it."""
        self.transport.close()
        if self._stalled is None and self.transport.get_write_buffer_size():
            self._look_again()

    def _look_again(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._stalled = self.loop.call_later(self.keep_alive_s, self._look_whether_less, left)

    def _look_whether_less(self, than: int) -> None:
        if self.transport.get_write_buffer_size() < than:
            self._look_again()
        else:
            # A client that takes nothing would hold its answer in memory, and the connection, for as long as it likes.
            self.transport.abort()

    def _forget_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _hand_over(self) -> None:
        """The connection is a websocket's, which has a protocol of its own: nothing is ever heard of it here again."""
        self._unexpect()
        self.silent.pop(self, None)
        self.parser = self.scope = self.cycle = None

    def _too_slow(self) -> None:
        self.silent.pop(self, None)
        if not self.transport.is_closing():
            if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
                self.refused(408)
                self.transport.write(self.too_slow)
            self.transport.close()


def _make_room(silent: dict[Any, None]) -> bool:
    """Closes the connection that has been silent for longest. False where every one has a request under way."""
    # Whoever still takes an answer goes last, and then at once: closing waits until all of it is taken.
    oldest = next((one for one in silent if not one.transport.get_write_buffer_size()), next(iter(silent), None))
    if oldest is None:
        return False
    del silent[oldest]
    if oldest.transport.get_write_buffer_size():
        oldest.transport.abort()
    else:
        oldest.transport.close()
    return True
