"""Escape text from outside (file names, class names), so that it is one line and valid in terminals, JSON and HTTP."""

import unicodedata
from collections.abc import Sequence

# Unicode categories of characters that end a line, control a terminal, or stand for an undecodable byte: control characters,
# surrogates, line and paragraph separators.
_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    """The text with control characters, surrogates and line separators escaped as in Python. Emoji and all else are kept."""
    if text.isprintable():
        return text
    return "".join(_escape(character) if unicodedata.category(character) in _ESCAPED else character for character in text)


def counted(names: Sequence[str], what: str) -> str:
    """The number and the first three of the names: '2 files (a, b)'. what: the noun in the singular."""
    shown = ", ".join(map(printable, names[:3]))
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown}{', ...' if len(names) > 3 else ''})"


def joined_notes(*notes: str) -> str:
    """The notes that are not empty, joined by '; '."""
    return "; ".join(note for note in notes if note)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
