"""uni-instruct export: compile a generator to engines that are proven equal to torch."""

import json
from dataclasses import asdict
from typing import Any

import rich_click as click

from uni_instruct.bundle import WEIGHTS, Bundle
from uni_instruct.engines.record import RECORD, EngineRecord
from uni_instruct.export.targets import TARGETS, Target, check_exportable, export_engine


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle")
@click.option(
    "--to",
    "kinds",
    type=click.Choice(list(TARGETS)),
    multiple=True,
    required=True,
    help="Engine to build; repeatable. " + " ".join(f"{target.kind}: {target.summary}." for target in TARGETS.values()),
)
@click.option("--dry-run", is_flag=True, help="Check the request and say what would be built; build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the records (engine.json) as JSON.")
def export(bundle: str, kinds: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Compile a one-step generator to an engine, and admit it only when it agrees with torch on fresh seeds.

    The engine and its parity report (engine.json) go to BUNDLE/engines. An older engine of the same kind stays until
    the new one has passed; a failed check leaves no engine and exits with 1.

    Example: uni-instruct export runs/digits/generator --to onnx
    """
    opened = Bundle.open(bundle)
    check_exportable(opened)
    targets = [TARGETS[kind] for kind in dict.fromkeys(kinds)]
    plans = [plan(opened, target) for target in targets]
    if dry_run:
        print(json.dumps(plans, indent=2) if as_json else "\n".join(_plan_text(p) for p in plans))
        return
    records = []
    for target in targets:
        if not as_json:
            click.echo(f"building the {target.kind} engine and checking it against torch ...", err=True)
        records.append(export_engine(opened, target.kind))
        if not as_json:
            print(_summary(opened, records[-1]))
    if as_json:
        print(json.dumps([asdict(record) for record in records], indent=2))


def plan(bundle: Bundle, target: Target) -> dict[str, Any]:
    """What an export would write. Raises MissingExtraError where a tool is missing."""
    target.check_packages()
    folder = bundle.engine_folder(target.kind)
    return {
        "kind": target.kind,
        "path": str(folder / target.file_name(bundle)),
        "precision": target.precision,
        "about_bytes": (bundle.path / WEIGHTS).stat().st_size,
        "replaces": (folder / RECORD).is_file(),
        "weights_sha256": bundle.weights_sha256,
    }


def _plan_text(plan: dict[str, Any]) -> str:
    replaces = ", replacing the engine there" if plan["replaces"] else ""
    megabytes = plan["about_bytes"] / 1e6
    return f"would build {plan['path']} ({plan['kind']}, {plan['precision']}, about {megabytes:.1f} MB){replaces}"


def _summary(bundle: Bundle, record: EngineRecord) -> str:
    parity = record.parity
    smallest, largest = min(parity["batches"]), max(parity["batches"])
    return "\n".join(
        (
            f"{bundle.engine_folder(record.kind) / record.file}",
            f"  agrees with torch on {parity['images']} images of fresh seeds, batches {list(parity['batches'])}:",
            f"  relative L2 {parity['relative_l2']:.1e} (allowed {parity['tolerance']['relative_l2']:.0e}), "
            f"equal pixels {parity['equal_pixels']:.3%}, largest difference {parity['largest_pixel_difference']} level",
            f"  same image whatever the batch size: {'yes' if parity['batch_invariant'] else 'no'}; "
            f"{parity['latency_ms'][str(smallest)]:.1f} ms for {smallest} image, "
            f"{parity['latency_ms'][str(largest)]:.1f} ms for {largest}",
        )
    )
