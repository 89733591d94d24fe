"""Downloads whose checksum is verified before the file is kept."""

import logging
import urllib.request
from collections.abc import Callable
from pathlib import Path

from uni_instruct.errors import RequestError
from uni_instruct.system.files import atomic_file

TIMEOUT_S = 60
_log = logging.getLogger(__name__)


def download(url: str, path: Path, is_valid: Callable[[bytes], bool], what: str, remedy: str) -> None:
    """Download the URL to `path`, atomically.

    is_valid: takes the content and compares it with a known checksum. what: the file's name in errors. remedy: of the errors.

    Raises RequestError if the download fails or `is_valid` returns False, DiskError if the file cannot be written.
    """
    _log.info("downloading %s to %s", url, path)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read()
    except OSError as error:
        reason = getattr(error, "reason", error)
        text = getattr(reason, "strerror", None) or reason
        raise RequestError(f"{what} cannot be downloaded ({text})", remedy=remedy) from error
    if not is_valid(content):
        raise RequestError(f"{what} from {url} has a wrong checksum", remedy=remedy)
    with atomic_file(path) as partial:
        partial.write_bytes(content)
