"""Deadlines for many items with a single timer."""

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

_Deadline = TypeVar("_Deadline", bound=Hashable)

# Tolerance for deadlines: an event loop may call a timer early by as much as the resolution of its clock.
_CLOCK_S = 0.001


class Deadlines(Generic[_Deadline]):
    """Calls `due` with each item that has not been removed by its deadline, on the event loop on which it was added.

    With a timer for each item, every request would create and cancel one, although most are finished in milliseconds.
    """

    def __init__(self, due: Callable[[_Deadline], None]):
        self._due = due
        self._deadlines: dict[_Deadline, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next = 0.0

    def add(self, item: _Deadline, deadline: float) -> None:
        """Add an item. deadline: in the event loop's time (`loop.time()`)."""
        self._deadlines[item] = deadline
        if self._timer is None or deadline < self._next:
            self._arm(deadline)

    def remove(self, item: _Deadline) -> None:
        """Remove an item, so that `due` is not called with it. Does nothing if it has been called already."""
        self._deadlines.pop(item, None)

    def _arm(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._next = deadline
        self._timer = asyncio.get_running_loop().call_at(deadline, self._run_due)

    def _run_due(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time() + _CLOCK_S
        for item in [item for item, deadline in self._deadlines.items() if deadline <= now]:
            if self._deadlines.pop(item, None) is not None:  # `due` of an earlier item may have removed this one
                self._due(item)
        if self._deadlines and self._timer is None:
            self._arm(min(self._deadlines.values()))
