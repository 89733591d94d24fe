"""The options --workers and --ray, shared by all commands that have them."""

import rich_click as click

from uni_instruct.sampling.workers import LOCAL, MAX_WORKERS, WorkerOptions

workers_option = click.option(
    "--workers",
    type=click.IntRange(1, MAX_WORKERS),
    help="Number of worker processes. They share the cores, or the GPUs in turn. [default: no workers]",
)
ray_option = click.option(
    "--ray",
    "ray_address",
    is_flag=False,
    flag_value=LOCAL,
    metavar="[ADDRESS]",
    help="Use Ray actors: of the cluster at ADDRESS (HOST:PORT), or by default of a Ray started on this machine.",
)


def worker_options_of(workers: int | None, ray_address: str | None, device: str | None) -> WorkerOptions:
    """The options as WorkerOptions. Raises RequestError if the workers cannot all run on that device."""
    options = WorkerOptions(workers, ray_address)
    options.check_device(device)
    return options
