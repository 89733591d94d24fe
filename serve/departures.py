"""Clients that leave: what they have asked for is cancelled, so that the engine's time goes to those who still wait."""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from uni_instruct.serve.deadlines import Deadlines

_T = TypeVar("_T")

# A request that is younger is not watched: most are over by then, and a task for each costs as much as its answer.
_YOUNG_S = 0.05


class _Waiting:
    """A client that waits for a task."""

    def __init__(self, receive: Receive, task: "asyncio.Task[Any]"):
        self.left = False
        self.watcher: asyncio.Task[None] | None = None
        self._receive, self._task = receive, task

    def watch(self) -> None:
        self.watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        # ASGI tells nobody that a client has left: its message has to be waited for beside the work.
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self._task.cancel()


class Departures:
    """Watches the clients of requests that take a while."""

    def __init__(self) -> None:
        self._young: Deadlines[_Waiting] = Deadlines(_Waiting.watch)

    async def unless_client_leaves(self, receive: Receive, work: Awaitable[_T]) -> _T:
        """What the work gives. When the client goes away the work is cancelled, and ClientDisconnect is raised."""
        task = asyncio.current_task()
        assert task is not None
        waiting = _Waiting(receive, task)
        self._young.add(waiting, asyncio.get_running_loop().time() + _YOUNG_S)
        try:
            return await work
        except asyncio.CancelledError:
            # Cancelled by the watcher, or from outside, as when the server stops: only the first is the client's doing.
            if waiting.left:
                task.uncancel()
                raise ClientDisconnect from None
            raise
        finally:
            self._young.remove(waiting)
            if waiting.watcher is not None:
                waiting.watcher.cancel()
