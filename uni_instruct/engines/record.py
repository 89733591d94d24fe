"""engine.json: what an exported engine was built from, by what, and how well it agrees with torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from uni_instruct.bundle import Bundle
from uni_instruct.errors import BundleError
from uni_instruct.files import sha256

RECORD = "engine.json"


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """The engine's file and its hash, the hash of the weights it was built from, precision, tool versions, parity report."""

    kind: str
    file: str
    file_sha256: str
    weights_sha256: str
    precision: str
    versions: Mapping[str, str]
    parity: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "EngineRecord":
        """The record of an engine's folder. Raises BundleError where it is missing or is not one."""
        path = folder / RECORD
        try:
            values = json.loads(path.read_text())
            record = cls(**{f.name: values[f.name] for f in fields(cls)})
        except FileNotFoundError as error:
            raise BundleError(f"{folder} has no {RECORD}", remedy="export the engine again") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path} does not describe an engine", remedy="export the engine again") from error
        if not isinstance(record.file, str) or Path(record.file).name != record.file:
            raise BundleError(f"{path} names the file {record.file!r}", remedy="export the engine again")
        if not isinstance(record.parity, dict) or not isinstance(record.versions, dict):
            raise BundleError(f"{path} does not describe an engine", remedy="export the engine again")
        return record

    def write(self, folder: Path) -> None:
        """Writes engine.json into the engine's folder."""
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n")


def verified_file(bundle: Bundle, folder: Path) -> Path:
    """The engine's file in `folder`, after its hash and the hash of the bundle's weights were compared with engine.json.

    Raises BundleError where the file is missing or altered, or was built from other weights.
    """
    record = EngineRecord.read(folder)
    remedy = f"run 'uni-instruct export {bundle.path} --to {record.kind}' again"
    if record.weights_sha256 != bundle.weights_sha256:
        raise BundleError(f"{folder} was built from other weights than those of {bundle.path}", remedy=remedy)
    path = folder / record.file
    if not path.is_file():
        raise BundleError(f"{folder} has no {record.file}", remedy=remedy)
    if sha256(path) != record.file_sha256:
        raise BundleError(f"{path} does not match the sha256 in {RECORD}", remedy=remedy)
    return path
