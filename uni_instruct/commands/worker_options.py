"""The options --workers and --ray, shared by all commands that have them."""

import rich_click as click

from uni_instruct.sampling.workers import LOCAL, MAX_WORKERS, WorkerOptions

workers_option = click.option(
    "--workers",
    type=click.IntRange(1, MAX_WORKERS),
    help="Processes that share the work, each with its part of the cores, or a GPU. [default: this one alone]",
)
ray_option = click.option(
    "--ray",
    "ray_address",
    is_flag=False,
    flag_value=LOCAL,
    metavar="[ADDRESS]",
    help="Let Ray's actors do the work: of the cluster at ADDRESS (HOST:PORT), or without it of a Ray on this machine.",
)


def worker_options_of(workers: int | None, ray_address: str | None, device: str | None) -> WorkerOptions:
    """The options as WorkerOptions. Raises RequestError if the workers cannot all run on that device."""
    options = WorkerOptions(workers, ray_address)
    options.check_device(device)
    return options
