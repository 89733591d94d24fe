"""Fingerprints of bundle folders, to see whether a bundle has changed since it was loaded without hashing its weights."""

from uni_instruct.bundle import CONFIG, DECODER, ENGINES, WEIGHTS, find_bundle
from uni_instruct.engines.record import RECORD
from uni_instruct.errors import RequestError
from uni_instruct.hub import is_on_hub
from uni_instruct.reference import REFERENCE

# (name, inode, size, mtime in ns) of each file that affects the images or the choice of the engine.
Fingerprint = tuple[tuple[str, int, int, int], ...]


def fingerprint(source: str) -> Fingerprint | None:
    """Return the fingerprint of a bundle's files, engines included, or None if there is no bundle or it is on the hub.

    Replacing the folder changes the inodes; copying files over the old ones changes their times.
    """
    if is_on_hub(source):
        return None  # nothing to watch: a bundle from the hub was downloaded at one commit, and does not change
    try:
        folder, _ = find_bundle(source)
        files = [folder / name for name in (CONFIG, WEIGHTS, DECODER, REFERENCE)]
        files += sorted((folder / ENGINES).glob(f"[!.]*/{RECORD}"))
        stats = [(str(file.relative_to(folder)), file.stat()) for file in files if file.exists()]
    except (RequestError, OSError):  # while a bundle is being replaced, it is missing for a moment
        return None
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
