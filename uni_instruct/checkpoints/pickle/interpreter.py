"""Interpret pickles without being able to run anything: only data are built, from globals that are on a list.

Python's own unpickler cannot be limited: it allocates any length that a file announces, has no bound on steps, and copies the
bytes of every storage. This one leaves out what no checkpoint's writer emits: protocol 0's text, objects by INST, extension
codes, out-of-band buffers, and opcodes that drop values from the stack.
"""

import pickletools
import struct
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from uni_instruct.checkpoints.budget import UNSUPPORTED, Budget, MalformedFile, shown
from uni_instruct.checkpoints.pickle.stand_in import AllowedGlobals, StandIn
from uni_instruct.checkpoints.source import Source

_MAX_NAME_LENGTH = 200
_MAX_INTEGER_BYTES = 16  # bytes; torch's magic number has ten
_MAX_INTEGER_KEY = 1 << 60  # below the modulus of Python's hash, so that no two keys have the same hash
_KEYS = (str, int, bool, bytes, type(None))
_MAX_PROTOCOL = 5
_SET_STEPS = 5  # an empty set takes four times the memory of an empty dict

_Container = TypeVar("_Container", list[object], dict[object, object], set[object])


class PickleInterpreter:
    """The stack and memo of one pickle.

    persistent: a function from a persistent id to its object; without it no such id is allowed.
    """

    def __init__(
        self,
        source: Source,
        budget: Budget,
        allowed: AllowedGlobals,
        persistent: Callable[[object], object] | None = None,
    ):
        self.source, self.budget, self.allowed, self.persistent = source, budget, allowed, persistent
        self.stack: list[object] = []
        self.marked: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """The value, with placeholders and stored tensors in it. Raises MalformedFile."""
        while (code := self.source.read(1)) != b".":
            self.budget.spend("opcodes", 1)
            step = _STEPS.get(code)
            if step is None:
                raise MalformedFile(f"uses pickle's {_opcode_name(code)}, which is not allowed", UNSUPPORTED)
            step(self)
        if len(self.stack) != 1 or self.marked:
            raise MalformedFile("is not a whole pickle")
        return self.stack[0]

    def push(self, value: object) -> None:
        """Put a value on top of the stack."""
        self.stack.append(value)

    def pop(self) -> object:
        """Take the top off the stack. Raises MalformedFile if the stack is empty."""
        if not self.stack:
            raise MalformedFile("is not a whole pickle: its stack is empty")
        return self.stack.pop()

    def top(self, type_: type[_Container]) -> _Container:
        """The top of the stack, which stays there. Raises MalformedFile if it is not of exactly that type."""
        # Exactly that type: an opcode for lists or dicts would call a subclass's own methods.
        if not self.stack or type(self.stack[-1]) is not type_:
            raise MalformedFile(f"is not a whole pickle: it fills a {type_.__name__} where there is none")
        return self.stack[-1]

    def pop_to_mark(self) -> list[object]:
        """Take everything above the last mark off the stack."""
        if not self.marked:
            raise MalformedFile("is not a whole pickle: a mark is missing")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def named(self, module: object, name: object) -> object:
        """The stand-in for a global. Raises MalformedFile if the global is not on the list."""
        if type(module) is not str or type(name) is not str or len(module) + len(name) > _MAX_NAME_LENGTH:
            raise MalformedFile(f"names {shown(module)} {shown(name)}, which cannot be a global", UNSUPPORTED)
        full = f"{module}.{name}"
        if full not in self.allowed.names:
            raise MalformedFile(f"names {shown(full)}, which is not among the globals of a checkpoint", UNSUPPORTED)
        return self.allowed.names[full]

    def checked_key(self, key: object) -> object:
        """The key of a dict or member of a set. Raises MalformedFile if its hash could be slow, or chosen to collide."""
        if type(key) not in _KEYS or (type(key) is int and abs(key) >= _MAX_INTEGER_KEY):
            raise MalformedFile(f"has a key of type {type(key).__name__}", UNSUPPORTED)
        if type(key) is int:
            self.budget.spend("keys that are numbers", 1)
        return key


def _protocol(interpreter: PickleInterpreter) -> None:
    if interpreter.source.unsigned(1) > _MAX_PROTOCOL:
        raise MalformedFile("is a pickle of an unknown protocol", UNSUPPORTED)


def _frame(interpreter: PickleInterpreter) -> None:
    if interpreter.source.unsigned(8) > interpreter.source.end - interpreter.source.position:
        raise MalformedFile("ends too early: a frame is not whole")


def _mark(interpreter: PickleInterpreter) -> None:
    interpreter.marked.append(interpreter.stack)
    interpreter.stack = []


def _unsigned(interpreter: PickleInterpreter, size: int) -> None:
    interpreter.push(interpreter.source.unsigned(size))


def _signed(interpreter: PickleInterpreter) -> None:
    interpreter.push(int.from_bytes(interpreter.source.read(4), "little", signed=True))


def _long(interpreter: PickleInterpreter) -> None:
    size = interpreter.source.unsigned(1)
    if size > _MAX_INTEGER_BYTES:
        raise MalformedFile(f"has an integer of {size} bytes", UNSUPPORTED)
    interpreter.push(int.from_bytes(interpreter.source.read(size), "little", signed=True))


def _float(interpreter: PickleInterpreter) -> None:
    interpreter.push(struct.unpack(">d", interpreter.source.read(8))[0])


def _text(interpreter: PickleInterpreter, size: int) -> None:
    try:
        interpreter.push(_counted(interpreter, interpreter.source.unsigned(size)).decode())
    except UnicodeDecodeError as error:
        raise MalformedFile("has a string that is not UTF-8") from error


def _python2_text(interpreter: PickleInterpreter, size: int) -> None:
    # Python 2's strings are bytes. Latin-1 has a character for each byte, so none is lost.
    interpreter.push(_counted(interpreter, interpreter.source.unsigned(size)).decode("latin1"))


def _bytes(interpreter: PickleInterpreter, size: int) -> None:
    length = interpreter.source.unsigned(size)
    # A storage's bytes stay in the file until they are read into their array, so that no tensor is in memory twice.
    caller = interpreter.stack[-1] if interpreter.stack else None
    if isinstance(caller, StandIn) and caller.takes_span:
        interpreter.push(interpreter.source.span(length))
    else:
        interpreter.push(_counted(interpreter, length))


def _counted(interpreter: PickleInterpreter, length: int) -> bytes:
    interpreter.budget.spend("bytes of text", length)
    return interpreter.source.read(length)


def _tuple(interpreter: PickleInterpreter, size: int) -> None:
    items = [interpreter.pop() for _ in range(size)]
    interpreter.push(tuple(reversed(items)))


def _tuple_to_mark(interpreter: PickleInterpreter) -> None:
    items = interpreter.pop_to_mark()
    interpreter.push(tuple(items))


def _append(interpreter: PickleInterpreter) -> None:
    item = interpreter.pop()
    interpreter.top(list).append(item)


def _extend(interpreter: PickleInterpreter) -> None:
    items = interpreter.pop_to_mark()
    interpreter.top(list).extend(items)


def _set_item(interpreter: PickleInterpreter) -> None:
    value, key = interpreter.pop(), interpreter.pop()
    interpreter.top(dict)[interpreter.checked_key(key)] = value


def _set_items(interpreter: PickleInterpreter) -> None:
    items = interpreter.pop_to_mark()
    target = interpreter.top(dict)
    if len(items) % 2:
        raise MalformedFile("is not a whole pickle: a key has no value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[interpreter.checked_key(key)] = value


def _empty_set(interpreter: PickleInterpreter) -> None:
    interpreter.budget.spend("opcodes", _SET_STEPS - 1)
    interpreter.push(set())


def _add_items(interpreter: PickleInterpreter) -> None:
    items = interpreter.pop_to_mark()
    interpreter.top(set).update(map(interpreter.checked_key, items))


def _frozenset(interpreter: PickleInterpreter) -> None:
    items = interpreter.pop_to_mark()
    interpreter.push(frozenset(map(interpreter.checked_key, items)))


def _global(interpreter: PickleInterpreter) -> None:
    module, name = (interpreter.source.line(_MAX_NAME_LENGTH).decode("ascii", "replace") for _ in range(2))
    interpreter.push(interpreter.named(module, name))


def _stack_global(interpreter: PickleInterpreter) -> None:
    name, module = interpreter.pop(), interpreter.pop()
    interpreter.push(interpreter.named(module, name))


def _reduce(interpreter: PickleInterpreter) -> None:
    arguments, function = interpreter.pop(), interpreter.pop()
    if not isinstance(function, StandIn) or function.call is None or type(arguments) is not tuple:
        raise MalformedFile(f"calls {_called(function)}, which is not a function of a checkpoint", UNSUPPORTED)
    interpreter.push(function.call(interpreter.budget, arguments))


def _new(interpreter: PickleInterpreter) -> None:
    arguments, class_ = interpreter.pop(), interpreter.pop()
    if not isinstance(class_, StandIn) or class_.new is None or type(arguments) is not tuple or arguments:
        raise MalformedFile(f"makes an object of {_called(class_)}, which is not a class of a checkpoint", UNSUPPORTED)
    interpreter.push(class_.new())


def _build(interpreter: PickleInterpreter) -> None:
    state = interpreter.pop()
    target = interpreter.stack[-1] if interpreter.stack else None
    build = interpreter.allowed.builders.get(type(target))
    if build is None:
        raise MalformedFile(f"gives a state to a {type(target).__name__}", UNSUPPORTED)
    build(interpreter.budget, target, state)


def _persistent_id(interpreter: PickleInterpreter) -> None:
    identity = interpreter.pop()
    if interpreter.persistent is None:
        raise MalformedFile("refers to an object outside itself by a persistent id", UNSUPPORTED)
    interpreter.push(interpreter.persistent(identity))


def _put(interpreter: PickleInterpreter, size: int) -> None:
    _remember(interpreter, interpreter.source.unsigned(size))


def _memoize(interpreter: PickleInterpreter) -> None:
    _remember(interpreter, len(interpreter.memo))


def _remember(interpreter: PickleInterpreter, index: int) -> None:
    if not interpreter.stack:
        raise MalformedFile("is not a whole pickle: its stack is empty")
    interpreter.memo[index] = interpreter.stack[-1]


def _get(interpreter: PickleInterpreter, size: int) -> None:
    index = interpreter.source.unsigned(size)
    if index not in interpreter.memo:
        raise MalformedFile(f"is not a whole pickle: it recalls value {index}, which does not exist")
    interpreter.push(interpreter.memo[index])


def _called(value: object) -> str:
    return shown(value.name) if isinstance(value, StandIn) else f"a {type(value).__name__}"


def _opcode_name(code: bytes) -> str:
    known = pickletools.code2op.get(code.decode("latin1"))  # type: ignore[attr-defined]
    return known.name if known else f"unknown opcode 0x{code.hex()}"


# The function of each opcode. An opcode that is not listed is an error.
_STEPS: dict[bytes, Callable[[PickleInterpreter], None]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": _mark,
    b"N": lambda interpreter: interpreter.push(None),
    b"\x88": lambda interpreter: interpreter.push(True),
    b"\x89": lambda interpreter: interpreter.push(False),
    b"K": partial(_unsigned, size=1),
    b"M": partial(_unsigned, size=2),
    b"J": _signed,
    b"\x8a": _long,
    b"G": _float,
    b"\x8c": partial(_text, size=1),
    b"X": partial(_text, size=4),
    b"\x8d": partial(_text, size=8),
    b"U": partial(_python2_text, size=1),
    b"T": partial(_python2_text, size=4),
    b"C": partial(_bytes, size=1),
    b"B": partial(_bytes, size=4),
    b"\x8e": partial(_bytes, size=8),
    b"\x96": partial(_bytes, size=8),  # a bytearray, when pickled; nothing here writes to it
    b"]": lambda interpreter: interpreter.push([]),
    b"a": _append,
    b"e": _extend,
    b")": lambda interpreter: interpreter.push(()),
    b"\x85": partial(_tuple, size=1),
    b"\x86": partial(_tuple, size=2),
    b"\x87": partial(_tuple, size=3),
    b"t": _tuple_to_mark,
    b"}": lambda interpreter: interpreter.push({}),
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
