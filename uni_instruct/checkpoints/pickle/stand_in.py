"""What stands in for the globals that a pickle names: functions and classes of ours, by the names of theirs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from uni_instruct.checkpoints.budget import Budget


@dataclass(frozen=True, eq=False)
class StandIn:
    """What stands in for one global: what it makes of arguments (REDUCE), and of none (NEWOBJ)."""

    name: str
    call: Callable[[Budget, tuple[Any, ...]], object] | None = None
    new: Callable[[], object] | None = None
    takes_span: bool = False  # its argument stays in the file


# A type of value -> what BUILD, which gives a value its state, does to one of them.
Builders = Mapping[type, Callable[[Budget, Any, object], None]]


@dataclass(frozen=True)
class AllowedGlobals:
    """The globals that a pickle may name, by 'module.name', and what BUILD may do."""

    names: Mapping[str, object]
    builders: Builders
