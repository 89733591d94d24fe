"""API keys: read from the environment or a file, checked once, and compared as bytes. No message ever contains a key."""

import base64
import binascii
import hmac
from collections.abc import Iterable, Sequence
from pathlib import Path

from uni_instruct.errors import RequestError


def read_keys(text: str | None, file: str | None) -> tuple[bytes, ...]:
    """Return the keys in `text` (separated by commas) and in `file` (one a line), encoded as UTF-8. Empty if both are None.

    Raises RequestError for a file that cannot be read, for a source without any key, and for a key with a space or a control
    character inside.
    """
    keys = [] if text is None else _checked(text.split(","), "UNI_INSTRUCT_API_KEY")
    if file is not None:
        try:
            # Windows' editors put a byte-order mark before UTF-8.
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            problem = f"UNI_INSTRUCT_API_KEY_FILE {file} cannot be read: {reason}"
            raise RequestError(problem, remedy="give a text file with one key a line", param="api_key_file") from None
        keys += _checked(lines, "UNI_INSTRUCT_API_KEY_FILE")
    return tuple(keys)


def given_key(header: bytes) -> bytes:
    """Return the key in an Authorization header: that of 'Bearer KEY', or the password of 'Basic'. Empty if there is none."""
    scheme, _, credentials = header.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return credentials.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


def is_one_of(key: bytes, keys: Sequence[bytes]) -> bool:
    """Whether the key is among `keys`. The time taken does not reveal which one matched, or how much of it was right."""
    # A list, not a generator: with a generator `any` would stop at the first match, and the time would show which it was.
    return any([hmac.compare_digest(key, one) for one in keys])  # noqa: C419


def _checked(texts: Iterable[str], source: str) -> list[bytes]:
    # Files end in a newline, and pasted text often has a space at its end. Neither belongs to the key.
    keys = [text.strip() for text in texts if text.strip()]
    if not keys:
        # Accepting an empty list would leave the server open although its owner believes that it is protected.
        raise RequestError(f"{source} contains no key", remedy="add one, or unset the variable to serve without API keys")
    for key in keys:
        if any(character.isspace() or not character.isprintable() for character in key):
            raise RequestError(
                f"a key in {source} has a space or a control character inside",
                remedy="use letters, digits and punctuation; separate several keys by commas, in a file by lines",
            )
    return [key.encode() for key in keys]
