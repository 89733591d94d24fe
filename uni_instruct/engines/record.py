"""Which engine an exported file is (EngineId), and what it was built from and how well it agrees with torch (engine.json)."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from shlex import quote
from typing import Any, TypedDict

from uni_instruct.errors import BundleError, RequestError
from uni_instruct.files import JSON_ERRORS, sha256

RECORD = "engine.json"
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
# The target of engines that are compiled on the machine that runs them.
COMPILED = "compiled"
_ID = re.compile(rf"(?P<runtime>[a-z][a-z0-9-]*?)-(?P<precision>{'|'.join(PRECISIONS)})(?:-(?P<target>[a-z0-9]+))?")
# Format 1 knew one engine a runtime, in a folder of its name, and other words in its report.
_FORMER_FOLDERS = {"onnx": "onnx-fp32"}
# The most bytes of an engine.json that are read: it has about two thousand.
_MAX_RECORD_BYTES = 1 << 20
_MAX_NAME_LENGTH = 255
_FORMER_WORDS = {"largest_level_difference": "largest_pixel_difference", "levels": "pixel_difference"}


@dataclass(frozen=True)
class EngineId:
    """(runtime, precision, target), written onnx-fp32, torch-fp32-compiled, tensorrt-fp16-sm90: the one name of an engine.

    The same word stands in `--engine`, as folder in a bundle's engines/, in headers, metrics, reports and engine.json. target
    is the device that an engine was built for, empty where it runs on any; COMPILED where its code is made on the machine.
    """

    runtime: str
    precision: str
    target: str = ""

    @classmethod
    def parse(cls, text: str) -> "EngineId":
        """Reads what `str` writes. Raises RequestError for anything else."""
        match = _ID.fullmatch(text)
        if match is None:
            raise RequestError(
                f"engine '{text[:60]}' is no engine id",
                remedy=f"write it as onnx-fp32 or tensorrt-fp16-sm90; precisions are {', '.join(PRECISIONS)}",
                param="engine",
            )
        return cls(match["runtime"], match["precision"], match["target"] or "")

    def __str__(self) -> str:
        return "-".join(part for part in (self.runtime, self.precision, self.target) if part)

    def export_options(self) -> str:
        """What `uni-instruct export BUNDLE` is told to build it and nothing else."""
        of_gpu = f" --sm {self.target[2:]}" if re.fullmatch(r"sm\d+", self.target) else ""
        return f"--to {self.runtime} --precision {self.precision}{of_gpu}"


class ParityTolerance(TypedDict):
    """The most that was allowed (`engines/outputs.py`)."""

    relative_l2: float
    pixel_difference: int


class ParityReport(TypedDict, total=False):
    """What export/parity.py found, as far as it is read again; earlier versions wrote less. latency_ms is by batch size."""

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
    """The engine's id, file and hash, the hash of the weights it was built from, tool versions, parity report.

    batch_profile is (least, best, most) images at once of an engine that was built for a range of them, () for any. parity is
    empty where the engine could not be tried where it was built, for want of its GPU. way says which of several ways to build
    it was taken, '' where there is one.
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
        """The record of an engine's folder. Raises BundleError where it is missing or is not one."""
        path = folder / RECORD
        try:
            if path.stat().st_size > _MAX_RECORD_BYTES:
                raise ValueError(path)
            values = _as_format_2(json.loads(path.read_text()))
            # Engines that run any batch have no profile; those of earlier versions have neither that nor a way.
            values = {"way": "", **values, "batch_profile": tuple(values.get("batch_profile", ()))}
            record = cls(**{f.name: values[f.name] for f in fields(cls)})
            EngineId.parse(record.engine_id)
        except FileNotFoundError as error:
            raise BundleError(f"{folder} has no {RECORD}", remedy="export the engine again") from error
        except (OSError, *JSON_ERRORS, KeyError, TypeError, AttributeError, RequestError) as error:
            raise BundleError(f"{path} does not describe an engine", remedy="export the engine again") from error
        if not _is_file_name(record.file):
            raise BundleError(f"{path} names the file {repr(record.file)[:60]}", remedy="export the engine again")
        if not record.is_whole():
            raise BundleError(f"{path} does not describe an engine", remedy="export the engine again")
        return record

    def is_whole(self) -> bool:
        """Whether what was read is of the right types, the report's numbers among them."""
        texts = (self.file_sha256, self.weights_sha256, self.way, *_texts_of(self.versions))
        return all(isinstance(text, str) for text in texts) and _is_report(self.parity) and _is_profile(self.batch_profile)

    def write(self, folder: Path) -> None:
        """Writes engine.json into the engine's folder."""
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=2) + "\n")


@dataclass(frozen=True, kw_only=True)
class StoredEngine:
    """An engine that stands in a bundle's engines/, or is being built beside its place. Nothing of it has been read yet.

    bundle and weights_sha256 are the path of its bundle and the hash of the bundle's weights.
    """

    engine_id: EngineId
    folder: Path
    bundle: Path
    weights_sha256: str

    def record(self) -> EngineRecord:
        """What engine.json says. Raises BundleError where it is damaged, or describes another engine or other weights."""
        try:
            record = EngineRecord.read(self.folder)
        except BundleError as error:
            raise BundleError(error.problem, remedy=self.export_again()) from error
        if record.id != self.engine_id:
            raise BundleError(f"{self.folder / RECORD} describes {record.engine_id}", remedy=self.export_again())
        if record.weights_sha256 != self.weights_sha256:
            problem = f"{self.folder} was built from other weights than those of {self.bundle}"
            raise BundleError(problem, remedy=self.export_again())
        return record

    def file(self) -> Path:
        """The engine's file, after its hash was compared with engine.json.

        Raises BundleError where the file is missing or altered, and what `record` raises.
        """
        record = self.record()
        path = self.folder / record.file
        if not path.is_file():
            raise BundleError(f"{self.folder} has no {record.file}", remedy=self.export_again())
        if sha256(path) != record.file_sha256:
            raise BundleError(f"{path} does not match the sha256 in {RECORD}", remedy=self.export_again())
        return path

    def export_again(self) -> str:
        """The remedy for what is wrong with its files, in words."""
        return f"run 'uni-instruct export {quote(str(self.bundle))} {self.engine_id.export_options()}' again"


def id_of_folder(name: str) -> EngineId | None:
    """The id of the engine that a folder of that name holds; None for a folder of anything else."""
    match = _ID.fullmatch(_FORMER_FOLDERS.get(name, name))
    return EngineId.parse(match[0]) if match else None


def former_folder(engine_id: EngineId) -> str | None:
    """The name of the folder that format 1 kept that engine in."""
    return next((folder for folder, written in _FORMER_FOLDERS.items() if written == str(engine_id)), None)


def _is_file_name(name: object) -> bool:
    """Whether it can be the name of a file in the engine's folder, and of nothing outside it."""
    usual = isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) <= _MAX_NAME_LENGTH
    return usual and name != ".." and Path(str(name)).name == name


def _texts_of(versions: object) -> tuple[object, ...]:
    """What should be texts in a table of versions; None, which is none, of anything else."""
    return tuple(versions.values()) if isinstance(versions, dict) else (None,)


def _is_report(parity: Any) -> bool:
    """Whether it is a report as far as it is read again, or the empty one of an engine that could not be tried."""
    if not parity:
        return isinstance(parity, dict)
    if not isinstance(parity, dict) or not isinstance(parity.get("latency_ms"), dict):
        return False
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
    """Format 1 wrote runtime and precision apart, and named a report's levels otherwise."""
    if "engine_id" in values:
        return values
    report = {_FORMER_WORDS.get(key, key): value for key, value in values["parity"].items()}
    tolerance = {_FORMER_WORDS.get(key, key): value for key, value in report.get("tolerance", {}).items()}
    return {**values, "engine_id": f"{values['kind']}-{values['precision']}", "parity": {**report, "tolerance": tolerance}}
