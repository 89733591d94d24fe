"""Stand-ins for the globals that a pickle names: functions and classes of this package under their names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from uni_instruct.checkpoints.budget import Budget


@dataclass(frozen=True, eq=False)
class StandIn:
    """The stand-in for one global. call: makes its value from arguments (REDUCE). new: makes its value without any (NEWOBJ)."""

    name: str
    call: Callable[[Budget, tuple[Any, ...]], object] | None = None
    new: Callable[[], object] | None = None
    takes_span: bool = False  # its argument is passed as a Span, which stays in the file


# The function for BUILD, which sets a value's state, by the type of the value.
Builders = Mapping[type, Callable[[Budget, Any, object], None]]


@dataclass(frozen=True)
class AllowedGlobals:
    """The globals that a pickle may name, by 'module.name', and the functions for BUILD."""

    names: Mapping[str, object]
    builders: Builders
