"""Graceful shutdown of a worker: waiting and new requests get 503 at once, running ones have a grace period to finish."""

import asyncio
import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_EVERY_S = 0.02
# Every open page of the demo holds a connection, and uvicorn would wait for it without end.
_OPEN_PAGES_S = 1


def uvicorn_server() -> "uvicorn.Server | None":
    """Return the uvicorn server that runs this app, or None under another ASGI server.

    Must be called before other code replaces uvicorn's signal handlers.
    """
    # Uvicorn's SIGTERM handler is a bound method of its server. An app has no other way to reach the server object.
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if hasattr(server, "handle_exit") and hasattr(server, "config") else None


class InFlightCount:
    """A context manager that counts the blocks that are entered and not yet left."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *error: object) -> None:
        self.count -= 1


class GracefulShutdown:
    """Counts running requests and delays uvicorn's own shutdown until they are done.

    grace_s: how many seconds they may take. `begun` is True once a signal to stop has arrived.
    """

    def __init__(self, grace_s: float):
        self.begun = False
        self.request = InFlightCount()  # use `with shutdown.request:` around a request that the shutdown should wait for
        self._grace_s = grace_s
        self._task: asyncio.Task[None] | None = None

    def watch(self, server: "uvicorn.Server", fail_waiting: Callable[[], None]) -> None:
        """Take over the signals that stop the server. Call it in the server's event loop.

        fail_waiting: called when the shutdown begins, to end the requests that are still in a queue.
        """
        handle_exit = server.handle_exit
        server.config.timeout_graceful_shutdown = server.config.timeout_graceful_shutdown or _OPEN_PAGES_S
        loop = asyncio.get_running_loop()

        def begin(number: int, frame: FrameType | None) -> None:
            if self.begun:
                handle_exit(number, frame)  # a second signal stops the server without the grace period
            else:
                self.begun = True
                # A signal handler may interrupt any code, so the event loop does the rest.
                loop.call_soon_threadsafe(start, number)

        def start(number: int) -> None:
            fail_waiting()
            self._task = asyncio.create_task(self._finish(lambda: handle_exit(number, None)))

        for number in _SIGNALS:
            signal.signal(number, begin)

    async def _finish(self, end: Callable[[], None]) -> None:
        logger.info("stopping: waiting for %d running requests", self.request.count)
        deadline = asyncio.get_running_loop().time() + self._grace_s
        while self.request.count and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_LOOK_EVERY_S)
        if self.request.count:
            logger.warning("stopping although %d requests did not finish within %g s", self.request.count, self._grace_s)
        end()
