"""Processes and devices, through Lightning Fabric: all processes hold equal weights; each works on its shard of a batch."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from uni_instruct.engines.hardware.threads import usable_cpus
from uni_instruct.errors import RequestError
from uni_instruct.system.processes import is_nonzero_rank
from uni_instruct.train.config import LoopConfig, Recipe
from uni_instruct.train.optimization.precision import AUTOCASTS

Module = TypeVar("Module", bound=torch.nn.Module)
Given = TypeVar("Given")

# A shorter run is over before a second process has loaded torch.
SHORT_KIMG = 20.0
# With fewer images, a process spends as much time on starting each layer as on computing it.
MIN_SHARE = 16


def processes_for(recipe: Recipe) -> int:
    """The default number of processes: with a GPU one; on the CPU up to one per core, if batches divide and the run is long.

    On the CPU processes are faster than threads: threads of torch wait for each other in every layer, processes only once a
    step. On two cores, two processes were 1.1 to 1.8 times as fast as two threads; with another busy program on one of the
    cores, threads almost stopped (benchmarks/processes.py).
    """
    if is_nonzero_rank():
        return int(os.environ["WORLD_SIZE"])  # rank 0 has decided
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return 1  # torchrun has chosen the number of processes; `start_fabric` reads it
    stages = [recipe.distillation] if recipe.teacher.bundle else [recipe.teacher, recipe.distillation]
    if torch.cuda.is_available() or sum(stage.duration_kimg for stage in stages) < SHORT_KIMG:
        return 1
    batches = (recipe.teacher.batch, recipe.distillation.batch)
    fitting = [n for n in range(1, usable_cpus() + 1) if all(batch % n == 0 and batch // n >= MIN_SHARE for batch in batches)]
    return max(fitting, default=1)


def share_cpus(processes: int) -> None:
    """Divide the CPU cores among the processes, as threads. Call it before the other processes are started."""
    if processes == 1 or is_nonzero_rank() or torch.cuda.is_available():
        return
    threads = max(1, usable_cpus() // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the other processes, which inherit it
    torch.set_num_threads(threads)


def start_fabric(devices: int, precision: str) -> Fabric:
    """A launched Fabric on `devices` GPUs, or with that many processes on the CPU.

    Under torchrun, its processes are used, on any number of machines. Otherwise the other processes are started here, by
    running the same command again. Raises RequestError if there are too few GPUs, or for 16-mixed on the CPU.
    """
    # torchrun has already started the processes, so `devices` is ignored.
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 0
    devices = launched or devices
    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise RequestError(
            f"--devices {devices} is more than the {torch.cuda.device_count()} GPUs of this machine",
            remedy="give a smaller --devices, or use torchrun on several machines",
            param="devices",
        )
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // devices if launched else 1
    return _launch(precision, devices, nodes)


@contextmanager
def exit_together(fabric: Fabric) -> Iterator[None]:
    """Make all processes wait for each other at the end of the block, then close their connections.

    A process that exited earlier would stop gloo's threads in the middle of their work and abort. The first process would be
    killed because of that, even if it is still writing.
    """
    try:
        yield
        fabric.barrier()
    finally:
        # Otherwise gloo's threads abort the process if the interpreter ends before them.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def gather_to_first(fabric: Fabric, part: Given) -> list[Given]:
    """Gather the `part` of every process. The first process gets a list in the order of ranks, the others an empty list."""
    if fabric.world_size == 1:
        return [part]
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.gather_object(part, parts if fabric.is_global_zero else None)
    return parts if fabric.is_global_zero else []


def single_process_fabric(precision: str) -> Fabric:
    """A launched Fabric for this process alone, even under torchrun."""
    # Speed trials run in single processes. In a group they would wait for processes that run none.
    return _launch(precision, 1, 1)


def _launch(precision: str, devices: int, nodes: int) -> Fabric:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "16-mixed" and device == "cpu":
        raise RequestError("loop.precision 16-mixed needs a GPU", remedy="--set precision=bf16-mixed", param="precision")
    # Otherwise Fabric writes several lines to standard error at every launch.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=device,
        devices=devices,
        num_nodes=nodes,
        strategy=_Replicas() if devices * nodes > 1 else "auto",
        # Our own autocast plugins, because Fabric's also rounds the inputs.
        plugins=None if precision == "32-true" else [AUTOCASTS[precision](precision, device)],  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric


def compiled_as_asked(module: Module, loop: LoopConfig) -> Module:
    """The module in the recipe's memory format, and compiled if the recipe asks for it. The computed function is the same."""
    module = with_memory_format(module, loop)
    # In place, so that the module keeps the names of its weights; last, so that the memory format is known.
    if loop.compile:
        module.compile()
    return module


def with_memory_format(module: Module, loop: LoopConfig) -> Module:
    """The module in the memory format that the recipe asks for."""
    if loop.channels_last is True:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def check_batches(recipe: Recipe, processes: int) -> None:
    """Raise RequestError if the batch of a stage that is trained cannot be divided equally among the processes."""
    stages = (recipe.distillation,) if recipe.teacher.bundle else (recipe.teacher, recipe.distillation)
    for stage in stages:
        if stage.batch % processes:
            nearest = max(1, round(stage.batch / processes)) * processes
            fewer = max(n for n in range(1, processes) if not any(each.batch % n for each in stages))
            raise RequestError(
                f"{stage.section}.batch {stage.batch} cannot be divided among {processes} processes",
                remedy=f"--set {stage.section}.batch={nearest}, or --devices {fewer}",
                param="devices",
            )


class BatchShard:
    """This process's shard of every global batch. `whole` and `micro_batches` are slices of the global batch.

    micro_batch is the most images at once, 0 for the whole shard. The processes divide the batch (`check_batches`).
    """

    def __init__(self, fabric: Fabric, batch: int, micro_batch: int):
        # With unequal shards, the mean of the processes' means would not be the mean of the batch.
        assert batch % fabric.world_size == 0, "check_batches"
        local = batch // fabric.world_size
        # Every process draws random numbers for the global batch and takes its slice, so that N processes see what one would.
        start = fabric.global_rank * local
        step = micro_batch or local
        self.whole = slice(start, start + local)
        self.micro_batches = [slice(at, min(at + step, start + local)) for at in range(start, start + local, step)]


class _Replicas(DDPStrategy):
    """Data parallelism without torch's DDP wrapper: `OptimizerStep` sums the gradients.

    The wrapper expects a backward pass into the same module after every forward pass. Here the student's gradient passes
    through the frozen critic, which breaks that assumption.
    """

    def setup_module(self, module: torch.nn.Module) -> Any:
        return module
