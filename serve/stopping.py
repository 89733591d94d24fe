"""How a worker stops: what waits is answered 503 at once, what runs is finished within a grace, new requests get 503."""

import asyncio
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import uvicorn

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_EVERY_S = 0.02
# Open pages of the demo hold a connection each, which the server would wait for.
_OPEN_PAGES_S = 1


def uvicorn_server() -> "uvicorn.Server | None":
    """The server that runs this app, None under another one. To be called before anybody else takes its signals."""
    # Uvicorn handles signals by a method of its server, which is the only way to it from inside an app.
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if hasattr(server, "handle_exit") and hasattr(server, "config") else None


class Stopping:
    """Counts the requests that run, and holds uvicorn's own shutdown back until they are done.

    grace_s: how long they may take.
    """

    def __init__(self, grace_s: float):
        self.begun = False
        self._grace_s = grace_s
        self._running = 0
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a request that is to be finished."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def watch(self, server: "uvicorn.Server", turn_away: Callable[[], None]) -> None:
        """Takes the signals that stop the server, in whose event loop this is called.

        turn_away: to be called once stopping has begun, for the requests that wait.
        """
        handle_exit = server.handle_exit
        server.config.timeout_graceful_shutdown = server.config.timeout_graceful_shutdown or _OPEN_PAGES_S
        loop = asyncio.get_running_loop()

        def begin(number: int, frame: FrameType | None) -> None:
            if self.begun:
                handle_exit(number, frame)  # asked twice: at once
            else:
                self.begun = True
                loop.call_soon_threadsafe(start, number)

        def start(number: int) -> None:
            turn_away()
            self._task = asyncio.create_task(self._finish(lambda: handle_exit(number, None)))

        for number in _SIGNALS:
            signal.signal(number, begin)

    async def _finish(self, end: Callable[[], None]) -> None:
        logger.info("stopping: %d requests are being finished", self._running)
        deadline = asyncio.get_running_loop().time() + self._grace_s
        while self._running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_LOOK_EVERY_S)
        if self._running:
            logger.warning("%d requests did not finish in %g s", self._running, self._grace_s)
        end()
