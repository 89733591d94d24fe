"""What other programs leave among a user's files, in folders, zips and tars alike."""

import re

# What systems and other programs leave among a user's files: hidden folders (.ipynb_checkpoints), copies of resource forks
# (macOS), thumbnails (Synology's @eaDir, Windows), waste bins, snapshots of a NAS.
_DROPPING = re.compile(
    r"(?:^|/)(?:\.[^/]+/|\._[^/]*$|\.DS_Store$|Icon\r$|e?h?thumbs(?:_vista)?\.db$|desktop\.ini$|"
    r"(?:__MACOSX|__pycache__|@eaDir|@tmp|@Recycle|@Recently-Snapshot|#recycle|#snapshot|~snapshot|\$RECYCLE\.BIN|"
    r"System Volume Information|Network Trash Folder|lost\+found)/)",
    re.IGNORECASE,
)


def is_dropping(name: str) -> bool:
    """Whether a file, or a folder whose name ends in '/', is what another program left there, and no user's file."""
    return _DROPPING.search(name) is not None
