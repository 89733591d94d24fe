"""How a worker stops: what waits is answered 503 at once, what runs is finished within a grace, new requests get 503."""

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
# Open pages of the demo hold a connection each, which the server would wait for.
_OPEN_PAGES_S = 1


def uvicorn_server() -> "uvicorn.Server | None":
    """The server that runs this app, None under another one. To be called before anybody else takes its signals."""
    # Uvicorn handles signals by a method of its server, which is the only way to it from inside an app.
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if hasattr(server, "handle_exit") and hasattr(server, "config") else None


class InFlightCount:
    """Counts the blocks that are entered and not yet left."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> None:
        self.count += 1

    def __exit__(self, *error: object) -> None:
        self.count -= 1


class GracefulShutdown:
    """Counts the requests that run, and holds uvicorn's own shutdown back until they are done.

    grace_s: how long they may take.
    """

    def __init__(self, grace_s: float):
        self.begun = False
        self.request = InFlightCount()  # `with shutdown.request:` around a request that is to be finished
        self._grace_s = grace_s
        self._task: asyncio.Task[None] | None = None

    def watch(self, server: "uvicorn.Server", fail_waiting: Callable[[], None]) -> None:
        """Takes the signals that stop the server, in whose event loop this is called.

        fail_waiting: to be called once stopping has begun, for the requests that wait.
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
            fail_waiting()
            self._task = asyncio.create_task(self._finish(lambda: handle_exit(number, None)))

        for number in _SIGNALS:
            signal.signal(number, begin)

    async def _finish(self, end: Callable[[], None]) -> None:
        logger.info("stopping: %d requests are being finished", self.request.count)
        deadline = asyncio.get_running_loop().time() + self._grace_s
        while self.request.count and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_LOOK_EVERY_S)
        if self.request.count:
            logger.warning("%d requests did not finish in %g s", self.request.count, self._grace_s)
        end()
