"""What a bundle's folder looks like from outside: whether it has changed since it was loaded, without hashing its weights."""

from uni_instruct.bundle import CONFIG, DECODER, ENGINES, WEIGHTS, find_bundle
from uni_instruct.engines.record import RECORD
from uni_instruct.errors import RequestError
from uni_instruct.hub import is_on_hub
from uni_instruct.reference import REFERENCE

# Name, inode, size and time of change of each file that decides what is served.
Fingerprint = tuple[tuple[str, int, int, int], ...]


def fingerprint(source: str) -> Fingerprint | None:
    """Of the bundle's files, new engines among them. None: there is nothing to watch (no bundle there, or one on the hub).

    A bundle that is replaced whole has new inodes, one that is copied over in place new times.
    """
    if is_on_hub(source):
        return None  # an address with its commit: what was downloaded does not change
    try:
        folder, _ = find_bundle(source)
        files = [folder / name for name in (CONFIG, WEIGHTS, DECODER, REFERENCE)]
        files += sorted((folder / ENGINES).glob(f"[!.]*/{RECORD}"))
        stats = [(str(file.relative_to(folder)), file.stat()) for file in files if file.exists()]
    except (RequestError, OSError):  # while it is replaced there is none for a moment
        return None
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
