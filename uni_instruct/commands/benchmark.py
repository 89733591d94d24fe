"""`uni-instruct benchmark`: measure all engines of a bundle side by side on this machine."""

import json
import os
import shlex
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import rich_click as click

from uni_instruct import __version__
from uni_instruct.bundle import Bundle
from uni_instruct.commands.benchmark_report import BenchmarkFacts, check_plot, plot, show
from uni_instruct.commands.option_types import FiniteRange
from uni_instruct.engine import RUNTIMES
from uni_instruct.engines.benchmark.comparison import BenchmarkPlan, compare
from uni_instruct.engines.hardware.machine import machine_facts
from uni_instruct.engines.hardware.threads import usable_cpus
from uni_instruct.errors import RequestError
from uni_instruct.system.progress import progress

BATCHES = "1,4,16,64"
MAX_BATCHES, MAX_BATCH_SIZE = 16, 4096


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle")
@click.option("--batches", default=BATCHES, help="Batch sizes.")
@click.option("--engine", "engines", multiple=True, help="Engine id or runtime; may be repeated. [default: all of the bundle]")
@click.option(
    "--device", help="Device of the engines: cpu, cuda or cuda:1. [default: a GPU if an engine can use one, else the CPU]"
)
@click.option("--rounds", type=click.IntRange(1, 1000), default=7, help="Number of rounds. Each measures all engines in turn.")
@click.option("--seconds", type=FiniteRange(0.001, 60), default=0.2, help="Minimum time of a measurement in seconds.")
@click.option(
    "--threads",
    type=click.Choice(["alone", "shared"]),
    default="alone",
    help="alone: waiting threads may spin, as in generate. shared: they sleep, as in a server.",
)
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Also write images/s by batch as a PNG.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def benchmark(
    bundle: str,
    batches: str,
    engines: tuple[str, ...],
    device: str | None,
    rounds: int,
    seconds: float,
    threads: str,
    plot_path: Path | None,
    as_json: bool,
) -> None:
    """Measure every engine of BUNDLE that runs on this machine.

    Their speed is compared with eager torch and with this machine's peak in convolutions. The engines take turns. Figures are
    medians over the rounds, with quartiles; ratios are computed within a round. Afterwards all commands use the fastest engine
    by default, unless --engine left some out.

    Example: uni-instruct benchmark fashion-mnist --batches 1,16,64 --plot speed.png
    """
    sizes = _batch_sizes(batches)
    check_plot(plot_path)
    opened = Bundle.open(bundle)
    plan = BenchmarkPlan(
        bundle=opened,
        batches=sizes,
        engines=engines,
        device=device,
        rounds=rounds,
        min_s=seconds,
        spin=threads == "alone",
    )
    load = os.getloadavg()[0]
    found = compare(plan, progress)
    facts = _facts(plan, load, threads)
    if plot_path is not None:
        plot(found, facts, plot_path)
    if as_json:
        print(json.dumps({**facts, **asdict(found)}, indent=2))
    else:
        show(found, facts)


def _batch_sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    sizes = sorted({int(part) for part in parts if part.isdecimal() and len(part) < 6})
    if not all(part.isdecimal() and len(part) < 6 for part in parts) or not 1 <= sizes[0] <= sizes[-1] <= MAX_BATCH_SIZE:
        raise RequestError(
            f"batches '{text[:60]}' are not sizes from 1 to {MAX_BATCH_SIZE}",
            remedy=f"write them as {BATCHES}",
            param="batches",
        )
    if len(sizes) > MAX_BATCHES:
        raise RequestError(f"{len(sizes)} batch sizes are too many", remedy=f"give at most {MAX_BATCHES}", param="batches")
    return tuple(sizes)


def _facts(plan: BenchmarkPlan, load: float, threads: str) -> BenchmarkFacts:
    spec = plan.bundle.spec
    return {
        "command": shlex.join(["uni-instruct", *sys.argv[1:]]),
        "generator": spec.name,
        "image_shape": spec.image_shape,
        "weights_sha256": plan.bundle.weights_sha256,
        "rounds": plan.rounds,
        "seconds_per_figure": plan.min_s,
        "threads": {"count": usable_cpus(), "policy": threads},
        # The machine's other work. Figures that are measured under load describe the load too; their ratios hardly do.
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "machine": machine_facts(),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {"uni-instruct": __version__}
    for package in ("numpy", *(name for runtime in RUNTIMES.values() for name in runtime.distributions)):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
