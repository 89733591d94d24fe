"""What a bundle can be exported to, and the one way there: build, verify, admit."""

import importlib
import importlib.util
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import uni_instruct
from uni_instruct.bundle import Bundle
from uni_instruct.engines.record import EngineRecord
from uni_instruct.errors import MissingExtraError, RequestError
from uni_instruct.export.parity import TOLERANCES, verify
from uni_instruct.files import atomic_folder, sha256


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of engine: the module whose `build(bundle, path) -> versions` writes its file, and what that needs."""

    kind: str
    module: str
    suffix: str
    precision: str
    summary: str
    packages: tuple[str, ...]

    def builder(self) -> Callable[[Bundle, Path], dict[str, str]]:
        """The module's build function. Raises MissingExtraError where a package it needs is not installed."""
        self.check_packages()
        build: Callable[[Bundle, Path], dict[str, str]] = importlib.import_module(self.module).build
        return build

    def check_packages(self) -> None:
        """Raises MissingExtraError where a package that the target needs is not installed."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(package, extra="export")

    def file_name(self, bundle: Bundle) -> str:
        """The engine file's name: model, resolution, kind, precision."""
        _, height, width = bundle.spec.image_shape
        model = re.sub(r"[^A-Za-z0-9._]+", "-", bundle.spec.name).strip("-.") or "generator"
        return f"{model}-{height}x{width}-{self.kind}-{self.precision}.{self.suffix}"


# One row and one module for each kind.
TARGETS = {
    target.kind: target
    for target in (
        Target(
            kind="onnx",
            module="uni_instruct.export.onnx",
            suffix="onnx",
            precision="fp32",
            summary="one ONNX file, opset 20, any batch size, for ONNX Runtime on the CPU",
            packages=("torch", "onnx", "onnxscript", "onnxruntime"),
        ),
    )
}


def check_exportable(bundle: Bundle) -> None:
    """Raises RequestError for a many-step teacher: an engine holds one evaluation of the network."""
    if bundle.spec.steps > 1:
        raise RequestError(
            f"{bundle.path} is a teacher of {bundle.spec.steps} steps, not a one-step generator",
            remedy="export the generator that 'train' distilled from it",
            param="bundle",
        )


def export_engine(bundle: Bundle, kind: str) -> EngineRecord:
    """Builds the engine beside its place, verifies it there, and only then lets it take the place of an older one.

    Raises RequestError for a teacher, MissingExtraError where a tool is missing, ParityError where the engine does not
    agree with torch, DiskError where it cannot be written; in all of these the bundle stays as it was.
    """
    check_exportable(bundle)
    target = TARGETS[kind]
    build = target.builder()
    place = bundle.engine_folder(kind)
    try:
        with atomic_folder(place) as folder:
            record = _build(bundle, target, build, folder)
            report = verify(bundle, record, folder, TOLERANCES[target.precision])
            replace(record, parity=report).write(folder)
    finally:
        with suppress(OSError):  # an empty engines folder, where nothing was admitted
            place.parent.rmdir()
    return EngineRecord.read(place)


def _build(bundle: Bundle, target: Target, build: Callable[[Bundle, Path], dict[str, str]], folder: Path) -> EngineRecord:
    path = folder / target.file_name(bundle)
    versions = {"uni_instruct": uni_instruct.__version__, **build(bundle, path)}
    record = EngineRecord(
        kind=target.kind,
        file=path.name,
        file_sha256=sha256(path),
        weights_sha256=bundle.weights_sha256,
        precision=target.precision,
        versions=versions,
    )
    record.write(folder)
    return record
