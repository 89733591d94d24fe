"""What a bundle can be exported to, and the one way there: build, verify, admit."""

import importlib
import importlib.util
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import uni_instruct
from uni_instruct.bundle import Bundle
from uni_instruct.engines.record import EngineId, EngineRecord, former_folder
from uni_instruct.errors import MissingExtraError, RequestError
from uni_instruct.export.parity import verify
from uni_instruct.files import atomic_folder, sha256
from uni_instruct.progress import ProgressFactory, silent

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One engine to build: the module whose `build(bundle, path, precision) -> versions` writes its file, and what it needs."""

    engine_id: EngineId
    module: str
    suffix: str
    summary: str
    packages: tuple[str, ...]

    def builder(self) -> Callable[[Bundle, Path, str], dict[str, str]]:
        """The module's build function. Raises MissingExtraError where a package it needs is not installed."""
        self.check_packages()
        build: Callable[[Bundle, Path, str], dict[str, str]] = importlib.import_module(self.module).build
        return build

    def check_packages(self) -> None:
        """Raises MissingExtraError where a package that the target needs is not installed."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(package, extra="export")

    def check_machine(self) -> None:
        """Raises MissingExtraError for a missing package, RequestError where this machine cannot run what would be built."""
        self.check_packages()
        check: Callable[[str], None] = importlib.import_module(self.module).check_machine
        check(self.engine_id.precision)

    def file_name(self, bundle: Bundle) -> str:
        """The engine file's name: model, resolution, engine id."""
        _, height, width = bundle.spec.image_shape
        model = re.sub(r"[^A-Za-z0-9._]+", "-", bundle.spec.name).strip("-.") or "generator"
        return f"{model}-{height}x{width}-{self.engine_id}.{self.suffix}"


TARGETS = {
    str(target.engine_id): target
    for target in (
        Target(
            engine_id=EngineId("onnx", "fp32"),
            module="uni_instruct.export.onnxruntime",
            suffix="onnx",
            summary="one ONNX file, opset 20, any batch size, for ONNX Runtime on the CPU",
            packages=("torch", "onnx", "onnxscript", "onnxruntime"),
        ),
        *(
            Target(
                engine_id=EngineId("openvino", precision),
                module="uni_instruct.export.openvino",
                suffix=suffix,
                summary=f"for OpenVINO on the CPU, {words}",
                packages=("torch", "onnx", "onnxscript", *more, "openvino"),
            )
            for precision, suffix, more, words in (
                ("fp32", "onnx", (), "in fp32"),
                ("bf16", "zip", (), "large layers in bf16 where the processor has it"),
                ("int8", "zip", ("nncf",), "large 3x3 convolutions in int8"),
            )
        ),
    )
}


def check_exportable(bundle: Bundle) -> None:
    """Raises RequestError for a many-step teacher (an engine holds one evaluation of the network), and for latents."""
    bundle.check_makes_pictures()
    if bundle.spec.steps > 1:
        raise RequestError(
            f"{bundle.path} is a teacher of {bundle.spec.steps} steps, not a one-step generator",
            remedy="export the generator that 'train' distilled from it",
            param="bundle",
        )


# What --to takes: every engine of a runtime, or of all.
TO = (*dict.fromkeys(target.engine_id.runtime for target in TARGETS.values()), ALL)


def choose_targets(to: Sequence[str], precisions: Sequence[str] = ()) -> list[Target]:
    """The targets of these runtimes, of all precisions unless some are given. Raises RequestError where a runtime has none."""
    chosen: dict[str, Target] = {}
    for runtime in to:
        fitting = {name: t for name, t in TARGETS.items() if runtime in (ALL, t.engine_id.runtime)}
        wanted = {name: t for name, t in fitting.items() if not precisions or t.engine_id.precision in precisions}
        if not wanted:
            known = ", ".join(dict.fromkeys(t.engine_id.precision for t in fitting.values()))
            raise RequestError(
                f"{runtime} engines have no precision {', '.join(precisions)}", remedy=f"choose from {known}", param="precision"
            )
        chosen |= wanted
    return list(chosen.values())


def export_engine(bundle: Bundle, engine_id: str, shows: ProgressFactory = silent) -> EngineRecord:
    """Builds the engine beside its place, verifies it there, and only then lets it take the place of an older one.

    A bundle of an older format is then brought up to date, with reference.npz beside the weights.
    Raises RequestError for a teacher, MissingExtraError where a tool is missing, ParityError where the engine does not
    agree with torch, DiskError where it cannot be written; in all of these the bundle stays as it was.
    """
    check_exportable(bundle)
    target = TARGETS[engine_id]
    build = target.builder()
    from uni_instruct.networks.reference import make_reference

    place = bundle.engine_folder(target.engine_id)
    try:
        with shows(f"export {engine_id}", 2, "steps (build, check)") as shown, atomic_folder(place) as folder:
            record = _build(bundle, target, build, folder)
            shown.advance(1)
            report = verify(bundle, record, folder)
            replace(record, parity=report).write(folder)
            shown.advance(1)
    finally:
        with suppress(OSError):  # an empty engines folder, where nothing was admitted
            place.parent.rmdir()
    bundle.bring_up_to_date(make_reference)
    _remove_former(bundle, target.engine_id)
    return EngineRecord.read(place)


def _remove_former(bundle: Bundle, engine_id: EngineId) -> None:
    """Format 1 kept the engine in another folder: the new one has taken its place."""
    name = former_folder(engine_id)
    if name:
        shutil.rmtree(bundle.engine_folder(engine_id).with_name(name), ignore_errors=True)


def _build(bundle: Bundle, target: Target, build: Callable[[Bundle, Path, str], dict[str, str]], folder: Path) -> EngineRecord:
    path = folder / target.file_name(bundle)
    versions = {"uni_instruct": uni_instruct.__version__, **build(bundle, path, target.engine_id.precision)}
    record = EngineRecord(
        engine_id=str(target.engine_id),
        file=path.name,
        file_sha256=sha256(path),
        weights_sha256=bundle.weights_sha256,
        versions=versions,
    )
    record.write(folder)
    return record
