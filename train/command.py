"""`uni-instruct train`."""

import json
import time
from pathlib import Path

import rich_click as click

from uni_instruct.processes import is_later_process
from uni_instruct.train.recipe import load_recipe


@click.command()
@click.argument("recipe")
@click.argument("more", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run; needed except with --dry-run.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change lines of the recipe; repeatable.")
@click.option("--devices", default=1, type=click.IntRange(1, 1024), help="GPUs, or processes on the CPU. Not with torchrun.")
@click.option(
    "--dry-run", is_flag=True, help="Check recipe, data and teacher, say what would be trained and its cost, and stop."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def train(
    recipe: str,
    more: tuple[str, ...],
    out: Path | None,
    overrides: tuple[str, ...],
    devices: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a teacher and distil it into a one-step generator.

    RECIPE is the name of a built-in recipe or a YAML file. Run the same command again to resume. The run folder holds
    recipe.yaml, log.jsonl, TensorBoard events, samples/, state/, the bundles teacher/ and generator/, and report.md.

    Example: uni-instruct train digits --out runs/digits --set method=dmd2 critic_updates=3
    """
    resolved = load_recipe(recipe, (*overrides, *more))
    if dry_run:
        if is_later_process():
            return
        from uni_instruct.train.dry_run.report import explain

        click.echo(explain(resolved, as_json))
        return
    if out is None:
        raise click.UsageError("Missing option '--out': the folder of the run")
    from uni_instruct.train.pipeline import train as train_run
    from uni_instruct.train.report.page import REPORT

    start = time.monotonic()
    bundle = train_run(resolved, out, devices)
    if is_later_process():
        return
    answer = {"bundle": str(bundle.path), "weights_sha256": bundle.weights_sha256, "time_s": time.monotonic() - start}
    if as_json:
        click.echo(json.dumps(answer))
    else:
        click.echo(f"generator: {bundle.path} ({answer['time_s']:.0f} s)")
        if (out / REPORT).exists():
            click.echo(f"report: {out / REPORT}")
        click.echo(f"next: uni-instruct generate {bundle.path} --seeds 0-63 --out {out}/images --grid {out}/grid.png")
