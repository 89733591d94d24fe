"""What a bundle can be exported to, and the one way there: build, verify, admit."""

import importlib
import importlib.util
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import uni_instruct
from uni_instruct.bundle import Bundle
from uni_instruct.engines.hardware.cuda import gpus
from uni_instruct.engines.record import EngineId, EngineRecord, former_folder
from uni_instruct.engines.tensorrt import PACKAGES
from uni_instruct.errors import MissingExtraError, ParityError, RequestError, UniInstructError
from uni_instruct.export.capabilities import BATCH_PROFILE, CAPABILITIES
from uni_instruct.export.parity import verify
from uni_instruct.files import atomic_folder, sha256
from uni_instruct.progress import ProgressFactory, silent

Builder = Callable[[Bundle, Path, str], dict[str, str]]
ALL = "all"
_SM = re.compile(r"sm\d{2,3}")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One engine to build: the module whose `build(bundle, path, precision) -> versions` writes its file, and what it needs.

    A module with a table WAYS, precision -> names, knows several ways to build it, from the fastest engine to the most exact
    one; its build takes `way` as well.

    packages are what it takes, by the extra that brings them. Where the engine is built for one compute capability of GPUs, sms
    are those it can have, build takes `runtime` and `sm` as well, and the id names one: `for_gpu` makes it of the table's row.
    only_with_gpu: on a machine without one it is built only where its precision is asked for.
    """

    engine_id: EngineId
    module: str
    suffix: str
    summary: str
    packages: tuple[str, ...]
    sms: tuple[int, ...] = ()
    extra: str = "export"
    only_with_gpu: bool = False

    @property
    def sm(self) -> int:
        """The compute capability that it is built for, times ten; 0 where it runs on any device."""
        return int(self.engine_id.target.removeprefix("sm") or 0)

    def for_gpu(self, sm: int) -> "Target":
        """The same for one compute capability. Raises RequestError where it cannot take the precision."""
        if sm not in self.sms:
            raise RequestError(
                f"{self.engine_id.runtime} has no {self.engine_id.precision} for sm{sm}",
                remedy=f"it has it for {', '.join(map(str, self.sms))}",
                param="sm",
            )
        return replace(self, engine_id=replace(self.engine_id, target=f"sm{sm}"))

    def builders(self) -> dict[str, Builder]:
        """Way -> build function, '' where there is one way; in their order. Raises MissingExtraError for a missing package."""
        self.check_packages()
        module = importlib.import_module(self.module)
        ways: Sequence[str] = getattr(module, "WAYS", {}).get(self.engine_id.precision, ())
        if ways:
            return {way: partial(module.build, way=way) for way in ways}
        return {"": partial(module.build, runtime=self.engine_id.runtime, sm=self.sm) if self.sms else module.build}

    def check_packages(self) -> None:
        """Raises MissingExtraError where a package that the target needs is not installed."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(package, extra="export" if package in BUILD_PACKAGES else self.extra)

    def check_machine(self) -> None:
        """Raises MissingExtraError for a missing package, RequestError where this machine cannot build it.

        What it builds it can also run, but for plans that need no GPU to be built.
        """
        self.check_packages()
        module = importlib.import_module(self.module)
        if self.sms:
            module.check_machine(self.engine_id.runtime, self.sm)
        else:
            module.check_machine(self.engine_id.precision)

    def can_be_tried(self) -> bool:
        """Whether this machine has the device that the engine is for."""
        return not self.sms or any(gpu.sm == self.sm for gpu in gpus())

    def file_name(self, bundle: Bundle) -> str:
        """The engine file's name: model, resolution, engine id."""
        _, height, width = bundle.spec.image_shape
        model = re.sub(r"[^A-Za-z0-9._]+", "-", bundle.spec.name).strip("-.") or "generator"
        return f"{model}-{height}x{width}-{self.engine_id}.{self.suffix}"


BUILD_PACKAGES = ("torch", "onnx", "onnxscript")
# Rows whose engines are built for one compute capability have none yet: `Target.for_gpu`.
TARGETS = {
    str(target.engine_id): target
    for target in (
        *(
            Target(
                engine_id=EngineId("onnx", precision),
                module="uni_instruct.export.onnxruntime",
                suffix="onnx",
                summary=f"one ONNX file, opset 20, any batch size, for ONNX Runtime, {words}",
                packages=(*BUILD_PACKAGES, "onnxruntime"),
                only_with_gpu=precision != "fp32",
            )
            for precision, words in (("fp32", "in fp32"), ("fp16", "in fp16 for GPUs (slow on a CPU)"))
        ),
        *(
            Target(
                engine_id=EngineId("openvino", precision),
                module="uni_instruct.export.openvino",
                suffix=suffix,
                summary=f"for OpenVINO on the CPU, {words}",
                packages=(*BUILD_PACKAGES, *more, "openvino"),
            )
            for precision, suffix, more, words in (
                ("fp32", "onnx", (), "in fp32"),
                ("bf16", "zip", (), "large layers in bf16 where the processor has it"),
                ("int8", "zip", ("nncf",), "large 3x3 convolutions in int8"),
            )
        ),
        *(
            Target(
                engine_id=EngineId(runtime, precision),
                module="uni_instruct.export.tensorrt",
                suffix="plan",
                summary=f"for {words}, in {precision}",
                packages=(*BUILD_PACKAGES, PACKAGES[runtime]),
                sms=sms,
                extra=extra,
            )
            for runtime, words, extra in (
                ("tensorrt", "TensorRT on this machine's kind of GPU", "gpu"),
                ("tensorrt-rtx", "TensorRT-RTX on the GPUs of --sm, which need not be here", "tensorrt-rtx"),
            )
            for precision, sms in CAPABILITIES[runtime].items()
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


def choose_targets(to: Sequence[str], precisions: Sequence[str] = (), sms: Sequence[int] = ()) -> list[Target]:
    """The targets of these runtimes, of all precisions unless some are given, for these GPUs or those of this machine.

    Raises RequestError where a runtime has no such precision, or not for such a GPU.
    """
    chosen: dict[str, Target] = {}
    for runtime in to:
        fitting = {name: t for name, t in TARGETS.items() if runtime in (ALL, t.engine_id.runtime)}
        wanted = {name: t for name, t in fitting.items() if not precisions or t.engine_id.precision in precisions}
        if not wanted:
            known = ", ".join(dict.fromkeys(t.engine_id.precision for t in fitting.values()))
            raise RequestError(
                f"{runtime} engines have no precision {', '.join(precisions)}", remedy=f"choose from {known}", param="precision"
            )
        chosen |= {name: t for name, t in wanted.items() if precisions or not t.only_with_gpu or gpus()}
    return [
        target for row in chosen.values() for target in (_for_gpus(row, sms, bool(precisions), ALL in to) if row.sms else [row])
    ]


def _for_gpus(row: Target, sms: Sequence[int], precision_given: bool, all_given: bool) -> list[Target]:
    """The row's targets for these GPUs. What cannot take the precision is left out where no precision was asked for."""
    known = sorted(
        {sm for target in TARGETS.values() if target.engine_id.runtime == row.engine_id.runtime for sm in target.sms}
    )
    if unknown := [sm for sm in sms if sm not in known]:
        raise RequestError(
            f"{row.engine_id.runtime} does not build for sm{unknown[0]}",
            remedy=f"choose from {', '.join(map(str, known))}",
            param="sm",
        )
    wanted = list(sms) or sorted({gpu.sm for gpu in gpus()})
    if not wanted and not all_given:
        raise RequestError(
            f"{row.engine_id.runtime} engines are built for one kind of GPU, and there is none here",
            remedy=f"say for which, as --sm 89; choose from {', '.join(map(str, known))}",
            param="sm",
        )
    return [row.for_gpu(sm) for sm in wanted if precision_given or sm in row.sms]


def targets_here() -> list[Target]:
    """The targets that this machine can build and try, those for its GPUs among them."""
    here = sorted({gpu.sm for gpu in gpus()})
    rows = [t for row in TARGETS.values() for t in ([row.for_gpu(sm) for sm in here if sm in row.sms] if row.sms else [row])]
    return [target for target in rows if _is_possible(target)]


def _is_possible(target: Target) -> bool:
    try:
        target.check_machine()
    except UniInstructError:
        return False
    return True


def find_target(engine_id: str) -> Target:
    """The target of that id. Raises RequestError where there is none."""
    parsed = EngineId.parse(engine_id)
    row = TARGETS.get(str(replace(parsed, target="")))
    if row is None or not (_SM.fullmatch(parsed.target) if row.sms else not parsed.target):
        raise RequestError(f"target '{engine_id}' is unknown", remedy=f"choose one of {', '.join(TARGETS)}", param="to")
    return row.for_gpu(int(parsed.target[2:])) if row.sms else row


def export_engine(bundle: Bundle, engine_id: str, device: str | None = None, shows: ProgressFactory = silent) -> EngineRecord:
    """Builds the engine beside its place, verifies it there, and only then lets it take the place of an older one.

    device: where it is verified, a GPU where it can use one unless told. A bundle of an older format is then brought up to
    date, with reference.npz beside the weights.
    Of several ways to build it, the fastest that agrees with something to spare is taken, or else the most exact one.
    Raises RequestError for a teacher, MissingExtraError where a tool is missing, CompilationError where one fails,
    ParityError where the engine does not agree with torch, DiskError where it cannot be written; in all of these the bundle
    stays as it was.
    """
    check_exportable(bundle)
    target = find_target(engine_id)
    builders = target.builders()
    from uni_instruct.networks.reference import make_reference

    place = bundle.engine_folder(target.engine_id)
    try:
        for left, (way, build) in zip(reversed(range(len(builders))), builders.items(), strict=True):
            label = f"export {engine_id}{f', {way}' if way else ''}"
            try:
                with shows(label, 2, "steps (build, check)") as shown, atomic_folder(place) as folder:
                    record = _build(bundle, target, build, folder, way)
                    shown.advance(1)
                    # Where its GPU is not at hand, the machine that runs it admits it, by reference.npz.
                    if device is not None or target.can_be_tried():
                        record = replace(record, parity=verify(bundle, record, folder, device, with_margin=left > 0))
                    record.write(folder)
                    shown.advance(1)
                break
            except ParityError:
                if not left:
                    raise
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


def _build(bundle: Bundle, target: Target, build: Builder, folder: Path, way: str) -> EngineRecord:
    path = folder / target.file_name(bundle)
    versions = {"uni_instruct": uni_instruct.__version__, **build(bundle, path, target.engine_id.precision)}
    record = EngineRecord(
        engine_id=str(target.engine_id),
        file=path.name,
        file_sha256=sha256(path),
        weights_sha256=bundle.weights_sha256,
        versions=versions,
        batch_profile=BATCH_PROFILE if target.sms else (),
        way=way,
    )
    record.write(folder)
    return record
