"""`uni-instruct doctor`: checks before a long training."""

import dataclasses
import json
import sys
from pathlib import Path

import rich_click as click

from uni_instruct.train.recipe import load_recipe


@click.command()
@click.argument("recipe")
@click.argument("more", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("."),
    help="Folder of the run; checked for an existing run and for free disk space.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override keys of the recipe; repeatable.")
@click.option(
    "--devices",
    type=click.IntRange(1, 1024),
    show_default="1 GPU, or up to one process per CPU core",
    help="GPUs, or processes on the CPU, that the run will use.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(
    recipe: str, more: tuple[str, ...], out: Path, overrides: tuple[str, ...], devices: int | None, as_json: bool
) -> None:
    """Check data, teacher, devices, memory and disk before a long training. Nothing is trained or written.

    Reads some of the data, lets the teacher denoise it, and compares what the run needs with what this machine has. The exit
    code is 2 if something is wrong.

    Example: uni-instruct doctor cifar10-uncond --set teacher=edm-cifar10-32x32-uncond-vp.pkl data=cifar10-32x32.zip
    """
    from uni_instruct.train.optimization.distributed import processes_for
    from uni_instruct.train.preflight import Preflight, examine

    resolved = load_recipe(recipe, (*overrides, *more))
    findings = examine(Preflight(resolved, out, devices or processes_for(resolved)))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            click.echo(f"{'ok   ' if finding.ok else 'WRONG'} {finding.subject}: {finding.words}")
    # Exit code 2 lets a script stop before it starts a long run.
    if not all(finding.ok for finding in findings):
        sys.exit(2)
