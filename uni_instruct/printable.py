"""Escape text from outside (file names, class names), so that it is one line and valid in terminals, JSON and HTTP."""

import unicodedata

# Unicode categories of characters that end a line, control a terminal, or stand for an undecodable byte: control characters,
# surrogates, line and paragraph separators.
_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    """The text with control characters, surrogates and line separators escaped as in Python. Emoji and all else are kept."""
    if text.isprintable():
        return text
    return "".join(_escape(character) if unicodedata.category(character) in _ESCAPED else character for character in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
