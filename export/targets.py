"""The engines that can be built from a bundle (TARGETS). Each is built, checked, and only then stored in the bundle."""

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
from uni_instruct.engines.record import EngineId, EngineRecord, format_1_folder
from uni_instruct.engines.tensorrt import PACKAGES
from uni_instruct.errors import MissingExtraError, ParityError, RequestError, UniInstructError
from uni_instruct.export.capabilities import BATCH_PROFILE, CAPABILITIES
from uni_instruct.export.parity import verify
from uni_instruct.system.files import atomic_folder, sha256
from uni_instruct.system.progress import ProgressFactory, silent

# (bundle, path of the file to write, precision) -> versions of the tools.
Builder = Callable[[Bundle, Path, str], dict[str, str]]
ALL = "all"
_SM = re.compile(r"sm\d{2,3}")


@dataclass(frozen=True, kw_only=True)
class Target:
    """An engine that can be built: the module that builds it, and what that needs.

    module: its `build(bundle, path, precision) -> versions` writes the engine's file. If it has a table WAYS (precision ->
    names), there are several ways to build an engine, from the fastest to the most exact, and `build` also takes `way`.
    packages: the Python packages that it needs; `extra` installs them. sms: for an engine that is built for one kind of GPU,
    the compute capabilities it can be built for. Its `build` also takes `runtime` and `sm`; `for_gpu` makes the target for one.
    only_with_gpu: on a machine without a GPU, it is built only if its precision is asked for.
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
        """The compute capability that it is built for, times ten; 0 if it is not built for one."""
        return int(self.engine_id.target.removeprefix("sm") or 0)

    def for_gpu(self, sm: int) -> "Target":
        """The target for one compute capability. Raises RequestError if the precision is not available for it."""
        if sm not in self.sms:
            raise RequestError(
                f"{self.engine_id.runtime} cannot build {self.engine_id.precision} engines for sm{sm}",
                remedy=f"choose from {', '.join(map(str, self.sms))}",
                param="sm",
            )
        return replace(self, engine_id=replace(self.engine_id, target=f"sm{sm}"))

    def builders(self) -> dict[str, Builder]:
        """Way -> build function, from the fastest engine to the most exact; '' is the key if there is only one way.

        Raises MissingExtraError for a missing package.
        """
        self.check_packages()
        module = importlib.import_module(self.module)
        ways: Sequence[str] = getattr(module, "WAYS", {}).get(self.engine_id.precision, ())
        if ways:
            return {way: partial(module.build, way=way) for way in ways}
        return {"": partial(module.build, runtime=self.engine_id.runtime, sm=self.sm) if self.sms else module.build}

    def check_packages(self) -> None:
        """Raises MissingExtraError if a package that the target needs is not installed."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(package, extra="export" if package in BUILD_PACKAGES else self.extra)

    def check_machine(self) -> None:
        """Raises MissingExtraError for a missing package, RequestError if this machine cannot build the engine.

        A machine that can build an engine can also run it, except for plans that are built without their GPU.
        """
        self.check_packages()
        module = importlib.import_module(self.module)
        if self.sms:
            module.check_machine(self.engine_id.runtime, self.sm)
        else:
            module.check_machine(self.engine_id.precision)

    def can_be_tried(self) -> bool:
        """Whether this machine has a device that can run the engine."""
        return not self.sms or any(gpu.sm == self.sm for gpu in gpus())

    def file_name(self, bundle: Bundle) -> str:
        """The name of the engine's file, from the model's name, the resolution and the engine's id."""
        _, height, width = bundle.spec.image_shape
        model = re.sub(r"[^A-Za-z0-9._]+", "-", bundle.spec.name).strip("-.") or "generator"
        return f"{model}-{height}x{width}-{self.engine_id}.{self.suffix}"


BUILD_PACKAGES = ("torch", "onnx", "onnxscript")
# All targets by engine id. Those for one compute capability are here without one: `Target.for_gpu` adds it.
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
                ("bf16", "zip", (), "large layers in bf16 if the processor has it"),
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
                ("tensorrt-rtx", "TensorRT-RTX on the GPUs that --sm names, which this machine need not have", "tensorrt-rtx"),
            )
            for precision, sms in CAPABILITIES[runtime].items()
        ),
    )
}


def check_exportable(bundle: Bundle) -> None:
    """Raises RequestError for a many-step teacher, as an engine is one evaluation of the network, and for latents."""
    bundle.check_makes_pictures()
    if bundle.spec.steps > 1:
        raise RequestError(
            f"{bundle.path} is a teacher of {bundle.spec.steps} steps, not a one-step generator",
            remedy="export the generator that 'train' distilled from it",
            param="bundle",
        )


# The values of --to: a runtime, for all of its engines, or 'all'.
TO = (*dict.fromkeys(target.engine_id.runtime for target in TARGETS.values()), ALL)


def choose_targets(to: Sequence[str], precisions: Sequence[str] = (), sms: Sequence[int] = ()) -> list[Target]:
    """The targets of these runtimes, in these precisions (default: all), for these GPUs (default: those of this machine).

    Raises RequestError if a runtime lacks a precision, or lacks it for one of the GPUs.
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
    """The row's targets for these GPUs. Without --precision, GPUs that lack the row's precision are left out.

    Raises RequestError for a GPU that the runtime does not support, and if no GPU is here or named, except for --to all.
    """
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
            f"each {row.engine_id.runtime} engine is built for one kind of GPU, and this machine has no GPU",
            remedy=f"name the compute capability, such as --sm 89 for 8.9; choose from {', '.join(map(str, known))}",
            param="sm",
        )
    return [row.for_gpu(sm) for sm in wanted if precision_given or sm in row.sms]


def targets_here() -> list[Target]:
    """The targets that this machine can build and run, including those for its GPUs."""
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
    """The target with that id. Raises RequestError if there is none."""
    parsed = EngineId.parse(engine_id)
    row = TARGETS.get(str(replace(parsed, target="")))
    if row is None or not (_SM.fullmatch(parsed.target) if row.sms else not parsed.target):
        raise RequestError(f"target '{engine_id}' is unknown", remedy=f"choose one of {', '.join(TARGETS)}", param="to")
    return row.for_gpu(int(parsed.target[2:])) if row.sms else row


def export_engine(
    bundle: Bundle, engine_id: str, device: str | None = None, with_progress: ProgressFactory = silent
) -> EngineRecord:
    """Build an engine in a temporary folder, check it there, and only then put it into the bundle, in place of an older one.

    If there are several ways to build it, the first that agrees with torch with a margin is used, or else the most exact one.
    device: where it is checked; by default a GPU if the engine can use one. Afterwards a bundle of an older format is brought
    up to date, and gets a reference.npz. Raises RequestError for a teacher or an unknown id, MissingExtraError if a tool is
    missing, CompilationError if one fails, ParityError if the engine does not agree with torch, DiskError if it cannot be
    written. In all these cases the bundle stays as it was.
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
                with with_progress(label, 2, "steps (build, check)") as bar, atomic_folder(place) as folder:
                    record = _build(bundle, target, build, folder, way)
                    bar.advance(1)
                    # Without its GPU it cannot be checked here: the machine that runs it then tries it first, on reference.npz.
                    if device is not None or target.can_be_tried():
                        record = replace(record, parity=verify(bundle, record, folder, device, with_margin=left > 0))
                    record.write(folder)
                    bar.advance(1)
                break
            except ParityError:
                if not left:
                    raise
    finally:
        with suppress(OSError):  # remove the engines folder if it is empty, as no engine passed
            place.parent.rmdir()
    bundle.upgrade_format(make_reference)
    _remove_format_1_engine(bundle, target.engine_id)
    return EngineRecord.read(place)


def _remove_format_1_engine(bundle: Bundle, engine_id: EngineId) -> None:
    """Remove the engine that format 1 kept in another folder, as the new one replaces it."""
    name = format_1_folder(engine_id)
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
