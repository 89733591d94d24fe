"""`uni-instruct train`: trains a recipe, and shows its plan (--dry-run) or the status of a run (--status)."""

import json
import os
import shlex
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from uni_instruct.errors import RequestError
from uni_instruct.system.processes import is_nonzero_rank, keep_freed_memory
from uni_instruct.train.run_lock import refuse_in_use

if TYPE_CHECKING:
    from uni_instruct.train.config import Recipe

WIDTH = 140  # columns of --help-recipe if the output is not a terminal


def _show_recipe_help(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """Print every key of a recipe and exit."""
    if not wanted or context.resilient_parsing:
        return
    from uni_instruct.train.recipe_help import recipe_help

    click.echo(recipe_help(shutil.get_terminal_size((WIDTH, 24)).columns))
    context.exit()


@click.command()
@click.argument("recipe")
@click.argument("more", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run; required, except with --dry-run or --status.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override keys of the recipe; repeatable.")
@click.option(
    "--devices",
    type=click.IntRange(1, 1024),
    show_default="1 GPU, or up to one process per CPU core",
    help="GPUs, or processes on the CPU. Not with torchrun.",
)
@click.option(
    "--teacher-only", is_flag=True, help="Stop after the teacher. Run the same command without this option to continue."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check recipe, data and teacher, show what would be trained and what it costs, and exit.",
)
@click.option("--status", is_flag=True, help="RECIPE is a run's folder: show its progress, speed and scores, and exit.")
@click.option(
    "--nice", default=0, type=click.IntRange(0, 19), help="Lower the CPU priority (niceness): 19 uses only idle CPU time."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option(
    "--help-recipe",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_recipe_help,
    help="Print every key of a recipe with default, range and meaning, and exit.",
)
def train(
    recipe: str,
    more: tuple[str, ...],
    out: Path | None,
    overrides: tuple[str, ...],
    devices: int | None,
    teacher_only: bool,
    dry_run: bool,
    status: bool,
    nice: int,
    as_json: bool,
) -> None:
    """Train a teacher and distil it into a one-step generator.

    RECIPE is the name of a built-in recipe or a YAML file. Run the same command again to resume. The run folder holds
    recipe.yaml, log.jsonl, TensorBoard events, samples/, state/, the bundles teacher/ and generator/, and report.md.

    `uni-instruct train RUN --status` shows the status of a run, whether it is running or not. It does not affect the run.

    Example: uni-instruct train digits --out runs/digits --set method=dmd2 critic_updates=3
    """
    if status:
        _show_status(recipe, out, bool(more or overrides or dry_run or teacher_only or devices or nice), as_json)
        return
    _lower_priority(nice)
    if out is not None and not dry_run and not is_nonzero_rank():
        refuse_in_use(out)  # checked first, because importing torch takes seconds
    keep_freed_memory()
    from uni_instruct.train.recipe import load_recipe

    resolved = load_recipe(recipe, (*overrides, *more))
    if dry_run:
        _explain(resolved, as_json)
    elif out is None:
        raise click.UsageError("Missing option '--out': the folder of the run")
    else:
        _train(resolved, out, devices, teacher_only, as_json)


def _explain(recipe: "Recipe", as_json: bool) -> None:
    if is_nonzero_rank():
        return
    from uni_instruct.train.dry_run.report import explain

    click.echo(explain(recipe, as_json))


def _train(recipe: "Recipe", out: Path, devices: int | None, teacher_only: bool, as_json: bool) -> None:
    from uni_instruct.train.optimization.distributed import processes_for, share_cpus
    from uni_instruct.train.pipeline import train as train_run
    from uni_instruct.train.report.page import REPORT

    start = time.monotonic()
    if devices is None:
        devices = processes_for(recipe)
        share_cpus(devices)
    bundle = train_run(recipe, out, devices, teacher_only=teacher_only)
    if is_nonzero_rank():
        return
    answer = {"bundle": str(bundle.path), "weights_sha256": bundle.weights_sha256, "time_s": time.monotonic() - start}
    if as_json:
        click.echo(json.dumps(answer))
    else:
        click.echo(f"{'teacher' if teacher_only else 'generator'}: {bundle.path} ({answer['time_s']:.0f} s)")
        if not teacher_only and (out / REPORT).exists():
            click.echo(f"report: {out / REPORT}")
        command = ["generate", bundle.path, "--seeds", "0-63", "--out", out / "images", "--grid", out / "grid.png"]
        click.echo(f"next: uni-instruct {shlex.join(map(str, command))}")


def _show_status(run: str, out: Path | None, others: bool, as_json: bool) -> None:
    from uni_instruct.train.monitoring.status import read_status
    from uni_instruct.train.monitoring.status_text import status_text

    if out is not None:
        raise RequestError(
            f"--status takes no --out, because its argument ({run}) is the run's folder",
            remedy=f"uni-instruct train {shlex.quote(str(out))} --status",
        )
    if others:
        raise RequestError(
            "--status can only be combined with --json", remedy=f"uni-instruct train {shlex.quote(run)} --status"
        )
    status = read_status(Path(run))
    click.echo(json.dumps(status.to_dict()) if as_json else status_text(status))


def _lower_priority(nice: int) -> None:
    """Raise this process's niceness to `nice`, unless it is as high already. Its threads and child processes inherit it.

    On Linux niceness belongs to a thread, so this must be called before any library starts threads.
    """
    if not nice:
        return
    # Windows has process priorities, but no niceness.
    if not hasattr(os, "nice"):
        raise RequestError("--nice is not supported on this system", remedy="leave it out", param="nice")
    os.nice(max(0, nice - os.nice(0)))
