"""Files that other programs leave among a user's files. They are ignored in folders, zips and tars."""

import re

# Hidden folders (.ipynb_checkpoints), copies of resource forks (macOS), thumbnails (Synology's @eaDir, Windows), recycle bins,
# snapshots of a NAS.
_IGNORED = re.compile(
    r"(?:^|/)(?:\.[^/]+/|\._[^/]*$|\.DS_Store$|Icon\r$|e?h?thumbs(?:_vista)?\.db$|desktop\.ini$|"
    r"(?:__MACOSX|__pycache__|@eaDir|@tmp|@Recycle|@Recently-Snapshot|#recycle|#snapshot|~snapshot|\$RECYCLE\.BIN|"
    r"System Volume Information|Network Trash Folder|lost\+found)/)",
    re.IGNORECASE,
)


def is_ignored(name: str) -> bool:
    """Whether a file, or a folder whose name ends in '/', was left by another program and is not the user's."""
    return _IGNORED.search(name) is not None
