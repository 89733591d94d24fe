"""Text of others (names of files, of classes) in one line that any terminal, JSON and HTTP take."""

import unicodedata
from collections.abc import Sequence

# What ends a line, moves a terminal's cursor, or stands for a byte that is no text: control characters, surrogates, separators.
_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    """The text with such characters written as Python escapes them; all else, such as joined emoji, as it is."""
    if text.isprintable():
        return text
    return "".join(_escape(character) if unicodedata.category(character) in _ESCAPED else character for character in text)


def counted(names: Sequence[str], what: str) -> str:
    """'2 files (a, b)': how many, and the first of them."""
    shown = ", ".join(map(printable, names[:3]))
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown}{', ...' if len(names) > 3 else ''})"


def joined_notes(*notes: str) -> str:
    """Those notes that say something, in one."""
    return "; ".join(note for note in notes if note)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
