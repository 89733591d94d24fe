"""Bundles and checkpoints on the Hugging Face hub: 'hf://owner/name[@revision]', 'hf://owner/name/file.pkl[@revision]'.

Downloads are in huggingface_hub's own cache.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from uni_instruct.errors import MissingExtraError, RequestError

SCHEME = "hf://"
_NAME = re.compile(r"(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[\w./-]+))?")
# Licence -> the hub's tag for it.
LICENCE_TAGS = {"CC-BY-4.0": "cc-by-4.0", "MIT": "mit", "Apache-2.0": "apache-2.0", "OFL-1.1": "ofl-1.1"}
# The files of a bundle. Other files of the repository are not downloaded.
BUNDLE_FILES = [
    "config.json",
    "model.safetensors",
    "decoder.safetensors",
    "reference.npz",
    "README.md",
    "samples.png",
    "engines/**",
]


@dataclass(frozen=True)
class Download:
    """path: the local folder or file. origin: its address on the hub, with the downloaded commit."""

    path: Path
    origin: str


def is_on_hub(source: str | Path) -> bool:
    """Whether the source is an address on the hub."""
    return str(source).startswith(SCHEME)


def names_file(source: str | Path) -> bool:
    """Whether the source is the address of a single file on the hub."""
    match = _NAME.fullmatch(str(source).removeprefix(SCHEME))
    return is_on_hub(source) and match is not None and match["file"] is not None


def fetch(source: str) -> Download:
    """Download the repository's bundle, or the single file that the address names, to huggingface_hub's cache.

    With HF_HUB_OFFLINE=1 only the cache is used.

    Raises RequestError if the address is invalid, if the repository, file or revision does not exist, or if the hub cannot be
    reached and the cache lacks the files. Raises MissingExtraError without huggingface_hub.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingExtraError("huggingface_hub", extra="hub") from error
    match = _NAME.fullmatch(source.removeprefix(SCHEME))
    if match is None:
        remedy = "write hf://owner/name, hf://owner/name/file, and @revision after either"
        raise RequestError(f"{source} is not an address on the hub", remedy=remedy, param="bundle")
    repository, file, revision = f"{match['owner']}/{match['name']}", match["file"], match["revision"]
    try:
        if file:
            path = Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
        else:
            path = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=BUNDLE_FILES))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        raise RequestError(f"{source} cannot be downloaded: {_reason(error)}", remedy=_remedy(), param="bundle") from error
    commit = path.relative_to(_snapshots(path)).parts[0]
    return Download(path, f"{SCHEME}{repository}{'/' + file if file else ''}@{commit}")


def _snapshots(path: Path) -> Path:
    """The folder of snapshots: huggingface_hub keeps a commit in <cache>/models--owner--name/snapshots/<commit>/."""
    return next(parent for parent in path.parents if parent.name == "snapshots")


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.GatedRepoError, "it is gated, and its terms must be accepted on the hub first"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private"),
        (errors.RevisionNotFoundError, "it has no such revision"),
        (errors.RemoteEntryNotFoundError, "it has no such file"),
        (errors.LocalEntryNotFoundError, "the hub was not reached, and the cache has no copy"),
    )
    known = next((reason for kind, reason in reasons if isinstance(error, kind)), None)
    return known or " ".join(str(error).split())[:200]


def _remedy() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "unset HF_HUB_OFFLINE to download it once"
    return "check the address and your connection; private repositories need HF_TOKEN"
