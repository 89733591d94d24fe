"""uni-instruct export: build engines from a generator, and check that they agree with torch."""

import json
from dataclasses import asdict
from typing import TypedDict

import rich_click as click

from uni_instruct.bundle import Bundle
from uni_instruct.engine import RUNTIMES
from uni_instruct.engines.hardware.device import checked_device
from uni_instruct.engines.record import PRECISIONS, EngineRecord
from uni_instruct.errors import CompilationError, ParityError, RequestError, UniInstructError
from uni_instruct.export.targets import ALL, TARGETS, TO, Target, check_exportable, choose_targets, export_engine
from uni_instruct.system.processes import release_large_blocks, sigterm_as_interrupt
from uni_instruct.system.progress import progress, silent


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle")
@click.option(
    "--to",
    "runtimes",
    type=click.Choice(list(TO)),
    multiple=True,
    required=True,
    help="Engines to build, by runtime; repeatable. "
    + " ".join(f"{name}: {target.summary}." for name, target in TARGETS.items() if not target.sms)
    + " tensorrt: for the kind of GPU in this machine."
    + " tensorrt-rtx: for the GPUs that --sm names, which this machine need not have."
    + " Both in fp32, fp16 and bf16.",
)
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(PRECISIONS),
    help="Build only engines of this precision; repeatable. [default: all]",
)
@click.option(
    "--sm",
    "sms_text",
    metavar="NUMBERS",
    help="GPUs to build for, by compute capability: 89 for 8.9; several as 80,89. [default: this machine's GPUs]",
)
@click.option(
    "--device", help="Device on which the engine is checked: cpu, cuda or cuda:1. [default: a GPU if the engine can use one]"
)
@click.option("--dry-run", is_flag=True, help="Check the request and say what would be built; build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the records (engine.json) as JSON.")
def export(
    bundle: str,
    runtimes: tuple[str, ...],
    precisions: tuple[str, ...],
    sms_text: str | None,
    device: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Build engines from a one-step generator. Each is kept only if it agrees with torch on new seeds.

    Engines and their parity reports (engine.json) are written to BUNDLE/engines. An older engine with the same id is
    replaced only if the new one passes. If a check fails, that engine is not stored; the others are still built, and
    the exit code is 1.

    An engine for a GPU that this machine lacks is stored unchecked: the machine that runs it checks it first.

    \b
    Example: uni-instruct export runs/digits/generator --to onnx
             uni-instruct export runs/digits/generator --to openvino --precision bf16
             uni-instruct export runs/digits/generator --to tensorrt-rtx --precision fp16 --sm 86,89,120
    """
    opened = Bundle.open(bundle)
    check_exportable(opened)
    targets = choose_targets(runtimes, precisions, _sms(sms_text, runtimes))
    if ALL in runtimes:
        _say_what_is_for_gpus(targets, precisions)
        targets = [target for target in targets if _can_be_built(target)]
    plans = [plan(opened, target, device) for target in targets]
    if dry_run:
        print(json.dumps(plans, indent=2) if as_json else "\n".join(_plan_text(p) for p in plans))
        return
    records, failures = _build(opened, targets, device, as_json)
    if as_json:
        print(json.dumps([asdict(record) for record in records], indent=2))
    for failure in failures[:-1]:
        click.echo(f"error: {failure}", err=True)
    if failures:
        raise failures[-1]


def _build(
    opened: Bundle, targets: list[Target], device: str | None, as_json: bool
) -> tuple[list[EngineRecord], list[UniInstructError]]:
    """Build the targets. Returns the records of the engines that passed, and the errors of the others."""
    release_large_blocks()
    records: list[EngineRecord] = []
    failures: list[UniInstructError] = []
    for target in targets:
        try:
            with sigterm_as_interrupt():
                records.append(export_engine(opened, str(target.engine_id), device, silent if as_json else progress))
        # Go on with the others: another precision may pass, and needs other tools.
        except (CompilationError, ParityError) as error:
            failures.append(error)
            continue
        if not as_json:
            print(_summary(opened, records[-1]))
    return records, failures


def _sms(text: str | None, runtimes: tuple[str, ...]) -> list[int]:
    """Parse compute capabilities such as '80,89'. Raises RequestError for other text, and if no runtime asked for uses them."""
    if text is None:
        return []
    if ALL not in runtimes and not any(target.sms and target.engine_id.runtime in runtimes for target in TARGETS.values()):
        raise RequestError(
            "--sm applies only to tensorrt and tensorrt-rtx, and --to names neither", remedy="leave --sm out", param="sm"
        )
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= 3 for part in parts):
        raise RequestError(f"--sm '{text[:60]}' cannot be read", remedy="write it as 89, or 80,86,89", param="sm")
    return list(dict.fromkeys(map(int, parts)))


def _say_what_is_for_gpus(targets: list[Target], precisions: tuple[str, ...]) -> None:
    """Tell the user which targets `choose_targets` left out, as this machine has no GPU, and how to build them here."""
    for row in TARGETS.values():
        if row.only_with_gpu and not precisions and row.engine_id not in {target.engine_id for target in targets}:
            reason = "it is meant for GPUs, and this machine has none"
            remedy = f"add --precision {row.engine_id.precision} to build it anyway"
            click.echo(f"skipping {row.engine_id}: {reason}; {remedy}", err=True)
    wanted = any(row.sms and (not precisions or row.engine_id.precision in precisions) for row in TARGETS.values())
    if wanted and not any(target.sms for target in targets):
        reason = "this machine has no GPU that they support"
        click.echo(f"skipping TensorRT engines: {reason}; name the GPUs to build for with --sm", err=True)


def _can_be_built(target: Target) -> bool:
    """Whether this machine can build the target. If not, tells the user why."""
    try:
        target.check_machine()
    except UniInstructError as error:
        click.echo(f"skipping {target.engine_id}: {error}", err=True)
        return False
    return True


class ExportPlan(TypedDict):
    """What an export of one engine would write, for --dry-run. replaces: whether the bundle already has that engine."""

    engine_id: str
    path: str
    about_bytes: int
    replaces: bool
    weights_sha256: str


def plan(bundle: Bundle, target: Target, device: str | None = None) -> ExportPlan:
    """What an export would write. Raises MissingExtraError if a tool is missing, RequestError if the device is.

    about_bytes is the size of the bundle's weights, as an engine's file is about as large.
    """
    target.check_machine()
    if device is not None:
        RUNTIMES[target.engine_id.runtime].device_for(target.engine_id, checked_device(device))
    return {
        "engine_id": str(target.engine_id),
        "path": str(bundle.engine_folder(target.engine_id) / target.file_name(bundle)),
        "about_bytes": bundle.weights_bytes(),
        "replaces": target.engine_id in bundle.engines(),
        "weights_sha256": bundle.weights_sha256,
    }


def _plan_text(plan: ExportPlan) -> str:
    replaces = ", replacing the engine there" if plan["replaces"] else ""
    megabytes = plan["about_bytes"] / 1e6
    return f"would build {plan['path']} ({plan['engine_id']}, about {megabytes:.1f} MB){replaces}"


def _summary(bundle: Bundle, record: EngineRecord) -> str:
    parity = record.parity
    if not parity:
        return (
            f"{bundle.engine_folder(record.id) / record.file}\n"
            f"  built for {record.id.target} but not checked, as this machine has no such GPU; "
            "the machine that runs it checks it first"
        )
    smallest, largest = min(parity["batches"]), max(parity["batches"])
    return "\n".join(
        (
            f"{bundle.engine_folder(record.id) / record.file}{f' ({record.way})' if record.way else ''}",
            f"  agrees with torch on {parity['images']} images of fresh seeds, batches {list(parity['batches'])}:",
            f"  relative L2 {parity['relative_l2']:.1e} (allowed {parity['tolerance']['relative_l2']:.0e}), "
            f"equal pixels {parity['equal_pixels']:.3%}, largest difference {parity['largest_pixel_difference']} of 255 levels",
            f"  its images {'do not depend' if parity['batch_invariant'] else 'depend'} on the batch size; "
            f"{parity['latency_ms'][str(smallest)]:.1f} ms for {smallest} image, "
            f"{parity['latency_ms'][str(largest)]:.1f} ms for {largest}",
        )
    )
