"""Text of others (names of files, of classes) in one line that any terminal, JSON and HTTP take."""

import unicodedata

# What ends a line, moves a terminal's cursor, or stands for a byte that is no text: control characters, surrogates, separators.
_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    """The text with such characters written as Python escapes them; all else, such as joined emoji, as it is."""
    if text.isprintable():
        return text
    return "".join(_escape(character) if unicodedata.category(character) in _ESCAPED else character for character in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
