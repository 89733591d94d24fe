"""Interprets pickles without being able to run anything: it knows data, and names on a list.

An interpreter of its own, because the standard one cannot be held to limits: it allocates what a length announces, has no bound
on steps, and copies the bytes of every storage. What this one leaves out (protocol 0's text, objects by INST, extension
codes, out-of-band buffers, whatever drops from the stack) no checkpoint's writer emits.
"""

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from uni_instruct.checkpoints.budget import FOREIGN, Account, Fault, shown
from uni_instruct.checkpoints.source import Source

_LONGEST_NAME = 200
_LONGEST_INTEGER = 16  # bytes; torch's magic number has ten
_LARGEST_KEY = 1 << 60  # below the modulus of Python's hash, so that no two keys share one
_KEYS = (str, int, bool, bytes, type(None))
_NEWEST_PROTOCOL = 5
_SET_STEPS = 5  # an empty set takes four times the memory of an empty dict


@dataclass(frozen=True, eq=False)
class Named:
    """What stands in for a global of that name: what it makes of arguments (REDUCE), and of none (NEWOBJ)."""

    name: str
    call: Callable[[Account, tuple[Any, ...]], Any] | None = None
    new: Callable[[], Any] | None = None
    takes_span: bool = False  # its argument stays in the file


Builders = Mapping[type, Callable[[Account, Any, Any], None]]


@dataclass(frozen=True)
class Vocabulary:
    """The globals that a pickle may name, and what BUILD does to a value of a type."""

    names: Mapping[str, Any]
    builders: Builders


class Machine:
    """One pickle's stack and memo. persistent: what a persistent id stands for; without it none is allowed."""

    def __init__(
        self,
        source: Source,
        account: Account,
        vocabulary: Vocabulary,
        persistent: Callable[[Any], Any] | None = None,
    ):
        self.source, self.account, self.vocabulary, self.persistent = source, account, vocabulary, persistent
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The value, with drafts and stored tensors in it. Raises Fault."""
        while (code := self.source.read(1)) != b".":
            self.account.spend("opcodes", 1)
            step = _STEPS.get(code)
            if step is None:
                raise Fault(f"uses pickle's {_opcode_name(code)}, which is not allowed", FOREIGN)
            step(self)
        if len(self.stack) != 1 or self.marked:
            raise Fault("is not a whole pickle")
        return self.stack[0]

    def push(self, value: Any) -> None:
        """On top of the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """The top of the stack. Raises Fault where there is none."""
        if not self.stack:
            raise Fault("is not a whole pickle: its stack is empty")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        """The top of the stack, left there. Raises Fault where it is not of exactly that type."""
        if not self.stack or type(self.stack[-1]) is not kind:
            raise Fault(f"is not a whole pickle: it fills a {kind.__name__} where there is none")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        """Everything above the last mark."""
        if not self.marked:
            raise Fault("is not a whole pickle: a mark is missing")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def named(self, module: Any, name: Any) -> Any:
        """What stands in for a global. Raises Fault for one that is not on the list."""
        if type(module) is not str or type(name) is not str or len(module) + len(name) > _LONGEST_NAME:
            raise Fault(f"names {shown(module)} {shown(name)}, which cannot be a global", FOREIGN)
        full = f"{module}.{name}"
        if full not in self.vocabulary.names:
            raise Fault(f"names {shown(full)}, which is not among the globals of a checkpoint", FOREIGN)
        return self.vocabulary.names[full]

    def checked_key(self, key: Any) -> Any:
        """A key or member: of a type whose hash is quick. Raises Fault for any other."""
        if type(key) not in _KEYS or (type(key) is int and abs(key) >= _LARGEST_KEY):
            raise Fault(f"has a key of type {type(key).__name__}", FOREIGN)
        if type(key) is int:
            self.account.spend("keys that are numbers", 1)
        return key


def _protocol(machine: Machine) -> None:
    if machine.source.unsigned(1) > _NEWEST_PROTOCOL:
        raise Fault("is a pickle of an unknown protocol", FOREIGN)


def _frame(machine: Machine) -> None:
    if machine.source.unsigned(8) > machine.source.end - machine.source.position:
        raise Fault("ends too early: a frame is not whole")


def _mark(machine: Machine) -> None:
    machine.marked.append(machine.stack)
    machine.stack = []


def _unsigned(machine: Machine, size: int) -> None:
    machine.push(machine.source.unsigned(size))


def _signed(machine: Machine) -> None:
    machine.push(int.from_bytes(machine.source.read(4), "little", signed=True))


def _long(machine: Machine) -> None:
    size = machine.source.unsigned(1)
    if size > _LONGEST_INTEGER:
        raise Fault(f"has an integer of {size} bytes", FOREIGN)
    machine.push(int.from_bytes(machine.source.read(size), "little", signed=True))


def _float(machine: Machine) -> None:
    machine.push(struct.unpack(">d", machine.source.read(8))[0])


def _text(machine: Machine, size: int) -> None:
    try:
        machine.push(_counted(machine, machine.source.unsigned(size)).decode())
    except UnicodeDecodeError as error:
        raise Fault("has a string that is not UTF-8") from error


def _bytes(machine: Machine, size: int) -> None:
    length = machine.source.unsigned(size)
    caller = machine.stack[-1] if machine.stack else None
    if isinstance(caller, Named) and caller.takes_span:
        machine.push(machine.source.span(length))
    else:
        machine.push(_counted(machine, length))


def _counted(machine: Machine, length: int) -> bytes:
    machine.account.spend("bytes of text", length)
    return machine.source.read(length)


def _tuple(machine: Machine, size: int) -> None:
    items = [machine.pop() for _ in range(size)]
    machine.push(tuple(reversed(items)))


def _tuple_to_mark(machine: Machine) -> None:
    items = machine.pop_to_mark()
    machine.push(tuple(items))


def _append(machine: Machine) -> None:
    item = machine.pop()
    machine.top(list).append(item)


def _extend(machine: Machine) -> None:
    items = machine.pop_to_mark()
    machine.top(list).extend(items)


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.top(dict)[machine.checked_key(key)] = value


def _set_items(machine: Machine) -> None:
    items = machine.pop_to_mark()
    target = machine.top(dict)
    if len(items) % 2:
        raise Fault("is not a whole pickle: a key has no value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[machine.checked_key(key)] = value


def _empty_set(machine: Machine) -> None:
    machine.account.spend("opcodes", _SET_STEPS - 1)
    machine.push(set())


def _add_items(machine: Machine) -> None:
    items = machine.pop_to_mark()
    machine.top(set).update(map(machine.checked_key, items))


def _frozenset(machine: Machine) -> None:
    items = machine.pop_to_mark()
    machine.push(frozenset(map(machine.checked_key, items)))


def _global(machine: Machine) -> None:
    module, name = (machine.source.line(_LONGEST_NAME).decode("ascii", "replace") for _ in range(2))
    machine.push(machine.named(module, name))


def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(machine.named(module, name))


def _reduce(machine: Machine) -> None:
    arguments, function = machine.pop(), machine.pop()
    if not isinstance(function, Named) or function.call is None or type(arguments) is not tuple:
        raise Fault(f"calls {_called(function)}, which is not a function of a checkpoint", FOREIGN)
    machine.push(function.call(machine.account, arguments))


def _new(machine: Machine) -> None:
    arguments, kind = machine.pop(), machine.pop()
    if not isinstance(kind, Named) or kind.new is None or type(arguments) is not tuple or arguments:
        raise Fault(f"makes an object of {_called(kind)}, which is not a class of a checkpoint", FOREIGN)
    machine.push(kind.new())


def _build(machine: Machine) -> None:
    state = machine.pop()
    target = machine.stack[-1] if machine.stack else None
    build = machine.vocabulary.builders.get(type(target))
    if build is None:
        raise Fault(f"gives a state to a {type(target).__name__}", FOREIGN)
    build(machine.account, target, state)


def _persistent_id(machine: Machine) -> None:
    identity = machine.pop()
    if machine.persistent is None:
        raise Fault("refers to an object outside itself by a persistent id", FOREIGN)
    machine.push(machine.persistent(identity))


def _put(machine: Machine, size: int) -> None:
    _remember(machine, machine.source.unsigned(size))


def _memoize(machine: Machine) -> None:
    _remember(machine, len(machine.memo))


def _remember(machine: Machine, index: int) -> None:
    if not machine.stack:
        raise Fault("is not a whole pickle: its stack is empty")
    machine.memo[index] = machine.stack[-1]


def _get(machine: Machine, size: int) -> None:
    index = machine.source.unsigned(size)
    if index not in machine.memo:
        raise Fault(f"is not a whole pickle: it recalls value {index}, which it has not")
    machine.push(machine.memo[index])


def _called(value: Any) -> str:
    return shown(value.name) if isinstance(value, Named) else f"a {type(value).__name__}"


def _opcode_name(code: bytes) -> str:
    known = pickletools.code2op.get(code.decode("latin1"))  # type: ignore[attr-defined]
    return known.name if known else f"opcode 0x{code.hex()}, which is none of its,"


_STEPS: dict[bytes, Callable[[Machine], None]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": _mark,
    b"N": lambda machine: machine.push(None),
    b"\x88": lambda machine: machine.push(True),
    b"\x89": lambda machine: machine.push(False),
    b"K": partial(_unsigned, size=1),
    b"M": partial(_unsigned, size=2),
    b"J": _signed,
    b"\x8a": _long,
    b"G": _float,
    b"\x8c": partial(_text, size=1),
    b"X": partial(_text, size=4),
    b"\x8d": partial(_text, size=8),
    b"C": partial(_bytes, size=1),
    b"B": partial(_bytes, size=4),
    b"\x8e": partial(_bytes, size=8),
    b"\x96": partial(_bytes, size=8),  # a bytearray, when pickled; nothing here writes to it
    b"]": lambda machine: machine.push([]),
    b"a": _append,
    b"e": _extend,
    b")": lambda machine: machine.push(()),
    b"\x85": partial(_tuple, size=1),
    b"\x86": partial(_tuple, size=2),
    b"\x87": partial(_tuple, size=3),
    b"t": _tuple_to_mark,
    b"}": lambda machine: machine.push({}),
    b"s": _set_item,
    b"u": _set_items,
    b"\x8f": _empty_set,
    b"\x90": _add_items,
    b"\x91": _frozenset,
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"\x81": _new,
    b"b": _build,
    b"Q": _persistent_id,
    b"q": partial(_put, size=1),
    b"r": partial(_put, size=4),
    b"\x94": _memoize,
    b"h": partial(_get, size=1),
    b"j": partial(_get, size=4),
}
