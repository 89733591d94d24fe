"""Cancel the work for clients that disconnect, so that the engine's time goes to clients that still wait."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

# The key in a request's ASGI scope for the connection that it came on (set in http/connections.py).
CONNECTION = "uni_instruct.connection"

_T = TypeVar("_T")


class Connection(Protocol):
    """A connection that calls `on_lost`, if set, when the client disconnects."""

    on_lost: Callable[[], None] | None


class _WaitingClient:
    """A client that waits for the result of a task. `left` is True once it has disconnected."""

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
    """Return the result of `work`. If the client disconnects first, cancel the work and raise ClientDisconnect."""
    task = asyncio.current_task()
    assert task is not None
    waiting = _WaitingClient(task)
    connection: Connection | None = scope.get(CONNECTION)
    watcher = None
    if connection is not None:
        connection.on_lost = waiting.leave
    else:
        # Under other servers only ASGI's http.disconnect message reports it, so a second task has to wait for that message.
        watcher = asyncio.create_task(waiting.watch(receive))
    try:
        return await work
    except asyncio.CancelledError:
        # Only a cancellation by the client becomes ClientDisconnect; one from outside, as at shutdown, is passed on.
        if waiting.left:
            task.uncancel()
            raise ClientDisconnect from None
        raise
    finally:
        if connection is not None:
            connection.on_lost = None
        if watcher is not None:
            watcher.cancel()
