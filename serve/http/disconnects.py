"""Clients that leave: what they have asked for is cancelled, so that the engine's time goes to those who still wait."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

# Where a request's scope has the connection that it came on (http/connections.py).
CONNECTION = "uni_instruct.connection"

_T = TypeVar("_T")


class Connection(Protocol):
    """What tells when a client has left, by calling `on_lost`."""

    on_lost: Callable[[], None] | None


class _Waiting:
    """A client that waits for a task."""

    def __init__(self, task: "asyncio.Task[Any]"):
        self.left = False
        self._task = task

    def leave(self) -> None:
        self.left = True
        self._task.cancel()

    async def watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.leave()


async def cancel_on_disconnect(scope: Scope, receive: Receive, work: Awaitable[_T]) -> _T:
    """What the work gives. When the client goes away the work is cancelled, and ClientDisconnect is raised."""
    task = asyncio.current_task()
    assert task is not None
    waiting = _Waiting(task)
    connection: Connection | None = scope.get(CONNECTION)
    watcher = None
    if connection is not None:
        connection.on_lost = waiting.leave
    else:
        # ASGI itself tells nobody that a client has left: its message has to be waited for beside the work.
        watcher = asyncio.create_task(waiting.watch(receive))
    try:
        return await work
    except asyncio.CancelledError:
        # Cancelled by the client, or from outside, as when the server stops.
        if waiting.left:
            task.uncancel()
            raise ClientDisconnect from None
        raise
    finally:
        if connection is not None:
            connection.on_lost = None
        if watcher is not None:
            watcher.cancel()
