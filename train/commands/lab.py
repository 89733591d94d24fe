"""`uni-instruct lab`: compares several methods from one teacher on one page."""

import shlex
import sys
from pathlib import Path

import rich_click as click

from uni_instruct.commands.worker_options import ray_option, worker_options_of


@click.command()
@click.argument("recipe")
@click.argument("more", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--methods", multiple=True, required=True, metavar="NAME[ KEY=VALUE...],...", help="Methods to try; repeatable.")
@click.option("--seeds", default="0", help="Training seeds, such as 0-2. Each method is trained once with each seed.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder of the lab.")
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    help="Trainings to run at once; they share the CPU cores. "
    "[default: 1; with --ray: one per GPU, or one per node without GPUs]",
)
@ray_option
@click.option(
    "--nice", default=0, type=click.IntRange(0, 19), help="Lower the CPU priority (niceness): 19 uses only idle CPU time."
)
def lab(
    recipe: str,
    more: tuple[str, ...],
    methods: tuple[str, ...],
    seeds: str,
    out: Path,
    jobs: int | None,
    ray_address: str | None,
    nice: int,
) -> None:
    """Compare methods, all trained from one teacher with the same seeds and the same number of images.

    RECIPE and KEY=VALUE are as in `train`. The teacher is trained first, unless teacher.bundle gives one. Run the same command
    again to resume. The folder holds lab.html, lab.md, lab.json and the runs, which TensorBoard shows live.

    Example: uni-instruct lab digits --methods "sid, sid alpha=0.5, dmd2 critic_updates=1" --seeds 0-2 --out runs/lab
    """
    from uni_instruct.noise import parse_seeds
    from uni_instruct.train.lab.experiments import parse_variants, plan_lab, resolve_lab
    from uni_instruct.train.lab.page import write_page
    from uni_instruct.train.lab.processes import train_all

    worker_options_of(jobs, ray_address, None)  # raises now, before anything is trained, if Ray is asked for but missing
    planned = resolve_lab(plan_lab(recipe, more, parse_variants(methods), parse_seeds(seeds), out))
    click.echo(f"live: tensorboard --logdir {shlex.quote(str(out))}", err=True)
    if ray_address is None:
        failed = train_all(planned, jobs or 1, nice)
    else:
        from uni_instruct.train.lab.ray_trainings import RayTrainings

        with RayTrainings(ray_address, jobs) as trainings:
            failed = train_all(planned, trainings.jobs, nice, trainings.start)
    page = write_page(planned, failed, ["uni-instruct", *sys.argv[1:]])
    click.echo(f"results: {page}")
    if len(failed) == len(planned.experiments):
        sys.exit(1)
