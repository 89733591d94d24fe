"""EngineId names an engine. EngineRecord is its engine.json: what it was built from, and how well it agrees with torch."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from shlex import quote
from typing import Any, TypedDict

from uni_instruct.errors import BundleError, RequestError
from uni_instruct.system.files import JSON_ERRORS, sha256

RECORD = "engine.json"
# The order in which engines of one runtime are listed and preferred.
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
# The target of engines that are compiled on the machine that runs them.
COMPILED = "compiled"
_ID = re.compile(rf"(?P<runtime>[a-z][a-z0-9-]*?)-(?P<precision>{'|'.join(PRECISIONS)})(?:-(?P<target>[a-z0-9]+))?")
# Bundles of format 1 had one engine per runtime, in a folder with the runtime's name: folder -> engine id.
_FORMAT_1_FOLDERS = {"onnx": "onnx-fp32"}
# A larger engine.json is not read, so that a damaged one cannot fill the memory. A real one has about two thousand bytes.
_MAX_RECORD_BYTES = 1 << 20
# The usual limit of file systems, in bytes.
_MAX_NAME_LENGTH = 255
# Keys in the reports of format 1 -> the keys that replaced them.
_FORMAT_1_KEYS = {"largest_level_difference": "largest_pixel_difference", "levels": "pixel_difference"}


@dataclass(frozen=True)
class EngineId:
    """The name of an engine: runtime, precision and target, as in onnx-fp32, torch-fp32-compiled or tensorrt-fp16-sm90.

    `--engine`, folders in a bundle's engines/, headers, metrics, reports and engine.json all use this text. target is the kind
    of GPU that the engine was built for, such as sm90; COMPILED if its code is compiled on the machine that runs it; else ''.
    """

    runtime: str
    precision: str
    target: str = ""

    @classmethod
    def parse(cls, text: str) -> "EngineId":
        """Parse the text that `str` writes. Raises RequestError for anything else."""
        match = _ID.fullmatch(text)
        if match is None:
            raise RequestError(
                f"'{text[:60]}' is not an engine id",
                remedy="write RUNTIME-PRECISION or RUNTIME-PRECISION-TARGET, such as onnx-fp32 or tensorrt-fp16-sm90; "
                f"precisions are {', '.join(PRECISIONS)}",
                param="engine",
            )
        return cls(match["runtime"], match["precision"], match["target"] or "")

    def __str__(self) -> str:
        return "-".join(part for part in (self.runtime, self.precision, self.target) if part)

    def export_options(self) -> str:
        """The options with which `uni-instruct export BUNDLE` builds this engine and no other."""
        of_gpu = f" --sm {self.target[2:]}" if re.fullmatch(r"sm\d+", self.target) else ""
        return f"--to {self.runtime} --precision {self.precision}{of_gpu}"


class ParityTolerance(TypedDict):
    """The tolerance that an export applied, as engine.json stores it (`Tolerance` in engines/outputs.py)."""

    relative_l2: float
    pixel_difference: int


class ParityReport(TypedDict, total=False):
    """The values of an export's parity report that are read again. Earlier versions wrote fewer. latency_ms is by batch size.

    `export/parity.py` writes it, as `Report`.
    """

    images: int
    batches: list[int]
    relative_l2: float
    equal_pixels: float
    largest_pixel_difference: int
    batch_invariant: bool
    latency_ms: Mapping[str, float]
    machine: str
    tolerance: ParityTolerance


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """The content of engine.json: the engine's id, its file, hashes of the file and of the weights, tool versions, parity.

    batch_profile: (smallest, optimal, largest) batch of an engine built for a range of batch sizes; () if it takes any. parity:
    empty if the engine was built on a machine without its GPU, and so was not checked there. way: which of several ways to
    build it was used; '' if there is only one.
    """

    engine_id: str
    file: str
    file_sha256: str
    weights_sha256: str
    versions: Mapping[str, str]
    batch_profile: tuple[int, ...] = ()
    parity: ParityReport = field(default_factory=lambda: ParityReport())
    way: str = ""

    @property
    def id(self) -> EngineId:
        """The engine's id."""
        return EngineId.parse(self.engine_id)

    @classmethod
    def read(cls, folder: Path) -> "EngineRecord":
        """Read the record from an engine's folder. Raises BundleError if it is missing or malformed."""
        path = folder / RECORD
        try:
            if path.stat().st_size > _MAX_RECORD_BYTES:
                raise ValueError(path)
            values = _as_format_2(json.loads(path.read_text()))
            # JSON has no tuples. Records of earlier versions lack batch_profile and way.
            values = {"way": "", **values, "batch_profile": tuple(values.get("batch_profile", ()))}
            record = cls(**{f.name: values[f.name] for f in fields(cls)})
            EngineId.parse(record.engine_id)
        except FileNotFoundError as error:
            raise BundleError(f"{folder} has no {RECORD}", remedy="export the engine again") from error
        except (OSError, *JSON_ERRORS, KeyError, TypeError, AttributeError, RequestError) as error:
            raise BundleError(f"{path} is not a valid engine record", remedy="export the engine again") from error
        if not _is_file_name(record.file):
            raise BundleError(
                f"{path} names {repr(record.file)[:60]} as the engine's file, which is not a plain file name",
                remedy="export the engine again",
            )
        if not record.is_whole():
            raise BundleError(f"{path} is not a valid engine record", remedy="export the engine again")
        return record

    def is_whole(self) -> bool:
        """Whether all values have the right types, those of the report too."""
        texts = (self.file_sha256, self.weights_sha256, self.way, *_texts_of(self.versions))
        return all(isinstance(text, str) for text in texts) and _is_report(self.parity) and _is_profile(self.batch_profile)

    def write(self, folder: Path) -> None:
        """Write engine.json to the engine's folder."""
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class StoredEngine:
    """An exported engine in a bundle's engines/, or in the folder where it is being built. Its files are not read until needed.

    bundle and weights_sha256: the path of its bundle, and the hash of the bundle's weights.
    """

    engine_id: EngineId
    folder: Path
    bundle: Path
    weights_sha256: str

    def record(self) -> EngineRecord:
        """Read engine.json. Raises BundleError if it is damaged, or describes another engine or other weights."""
        try:
            record = EngineRecord.read(self.folder)
        except BundleError as error:
            raise BundleError(error.problem, remedy=self.export_again()) from error
        if record.id != self.engine_id:
            raise BundleError(
                f"{self.folder / RECORD} describes engine {record.engine_id}, but its folder is for {self.engine_id}",
                remedy=self.export_again(),
            )
        if record.weights_sha256 != self.weights_sha256:
            problem = f"the engine in {self.folder} was built from other weights than those in {self.bundle}"
            raise BundleError(problem, remedy=self.export_again())
        return record

    def file(self) -> Path:
        """The path of the engine's file, once its hash is found to match engine.json.

        Raises BundleError if the file is missing or altered, and what `record` raises.
        """
        record = self.record()
        path = self.folder / record.file
        if not path.is_file():
            raise BundleError(f"{self.folder} has no {record.file}", remedy=self.export_again())
        if sha256(path) != record.file_sha256:
            raise BundleError(f"{path} does not match the sha256 in {RECORD}", remedy=self.export_again())
        return path

    def export_again(self) -> str:
        """The remedy for damaged files, as an error states it: the command that exports the engine again."""
        return f"run 'uni-instruct export {quote(str(self.bundle))} {self.engine_id.export_options()}' again"


def id_of_folder(name: str) -> EngineId | None:
    """The id of the engine that a folder of that name holds; None if it is not an engine's folder."""
    match = _ID.fullmatch(_FORMAT_1_FOLDERS.get(name, name))
    return EngineId.parse(match[0]) if match else None


def format_1_folder(engine_id: EngineId) -> str | None:
    """The name of the engine's folder in bundles of format 1; None if format 1 did not have that engine."""
    return next((folder for folder, written in _FORMAT_1_FOLDERS.items() if written == str(engine_id)), None)


def _is_file_name(name: object) -> bool:
    """Whether the name is valid for a file in the engine's folder, and cannot lead outside it."""
    usual = isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) <= _MAX_NAME_LENGTH
    return usual and name != ".." and Path(str(name)).name == name


def _texts_of(versions: object) -> tuple[object, ...]:
    """The values of a table of versions, which must be strings. (None,) for anything else, so that the caller's check fails."""
    return tuple(versions.values()) if isinstance(versions, dict) else (None,)


def _is_report(parity: Any) -> bool:
    """Whether this is a parity report with all that is read again, or the empty one of an engine that was not checked."""
    if not parity:
        return isinstance(parity, dict)
    if not isinstance(parity, dict) or not isinstance(parity.get("latency_ms"), dict):
        return False
    # Only what is read again is checked. `type(...) in`, as isinstance would take True for an int.
    numbers: list[Any] = [parity.get(key) for key in ("images", "relative_l2", "equal_pixels")] + [
        *parity["latency_ms"].values()
    ]
    counts = all(str(batch).isdecimal() for batch in parity["latency_ms"])
    told = isinstance(parity.get("batch_invariant"), bool) and isinstance(parity.get("machine"), str)
    return told and counts and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)


def _is_profile(profile: tuple[Any, ...]) -> bool:
    whole = all(type(size) is int and size > 0 for size in profile)
    return not profile or (len(profile) == 3 and whole and list(profile) == sorted(profile))


def _as_format_2(values: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of format 1, which had runtime and precision as two keys, and other keys in its report."""
    if "engine_id" in values:
        return values
    report = {_FORMAT_1_KEYS.get(key, key): value for key, value in values["parity"].items()}
    tolerance = {_FORMAT_1_KEYS.get(key, key): value for key, value in report.get("tolerance", {}).items()}
    return {**values, "engine_id": f"{values['kind']}-{values['precision']}", "parity": {**report, "tolerance": tolerance}}
