"""Limits on what a checkpoint may ask for, a count of what it has asked for, and the errors that refuse it.

A few bytes in a hostile file can ask for any amount of memory or time: a length, a shape, a repeated value. So every cost is
counted before it is paid.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from uni_instruct.errors import FileFormatError, RequestError

COPY_AGAIN = "copy or download it again"
UNSUPPORTED = "nothing in it was run; give a file of EDM, EDM2, SiD, SiDA or Uni-Instruct, or a .safetensors"
_NAME_SHOWN = 80
# Integers hash to themselves, so a file can choose keys that collide, and each insertion then compares all the others.
_NUMBER_KEYS = 20_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What reading one file may cost. The defaults are several times what the largest published files need.

    opcodes: steps of all its pickles together. values and depth: of the resulting tree; a value that occurs twice counts twice.
    text_bytes: strings and bytes outside tensors. tensor_ratio: bytes of all tensors over those of the file. Widening bfloat16
    doubles them, and tied weights count each time they occur.
    """

    file_bytes: int = 64 << 30
    opcodes: int = 1_000_000
    values: int = 1_000_000
    depth: int = 100
    text_bytes: int = 64 << 20
    tensor_ratio: float = 4.0


class MalformedFile(Exception):
    """A fault of a file, in words that follow its name. `reading` adds the name and raises it as FileFormatError."""

    def __init__(self, problem: str, remedy: str = COPY_AGAIN):
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


class Budget:
    """What one file may still ask for."""

    def __init__(self, limits: Limits, file_bytes: int):
        if file_bytes > limits.file_bytes:
            raise MalformedFile(
                f"has {file_bytes:,} bytes, more than {limits.file_bytes:,}", "raise Limits.file_bytes to read it"
            )
        self.limits = limits
        self.file_bytes = file_bytes
        self._allowed = {
            "opcodes": limits.opcodes,
            "bytes of text": limits.text_bytes,
            # Every storage is a part of the file, and no two overlap.
            "bytes of storages": file_bytes,
            "bytes of tensors": int(limits.tensor_ratio * file_bytes),
            "bytes of networks": int(limits.tensor_ratio * file_bytes),
            "keys that are numbers": _NUMBER_KEYS,
        }
        self._left = dict(self._allowed)

    def spend(self, what: str, amount: int) -> None:
        """Count a cost. Raises MalformedFile if the file asks for more than it may."""
        self._left[what] -= amount
        if self._left[what] < 0:
            raise MalformedFile(f"asks for more than {self._allowed[what]:,} {what}", UNSUPPORTED)


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Within the block, turn every error of reading the named file into one of the project's errors."""
    try:
        yield
    except MalformedFile as error:
        raise FileFormatError(f"{name} {error.problem}", remedy=error.remedy, param="checkpoint") from error
    except OSError as error:
        remedy = "make it readable" if isinstance(error, PermissionError) else COPY_AGAIN
        raise RequestError(f"cannot read {name}: {error.strerror or error}", remedy=remedy, param="checkpoint") from error
    except MemoryError as error:
        raise RequestError(
            f"{name} does not fit into memory", remedy="free memory or use a larger machine", param="checkpoint"
        ) from error


def shown(name: object) -> str:
    """A name from a file, as it may be shown in a message: quoted, in ASCII, short."""
    text = name if isinstance(name, str) else type(name).__name__
    return ascii(text if len(text) <= _NAME_SHOWN else text[:_NAME_SHOWN] + "...")
