"""Processes and devices, through Lightning Fabric: every process holds equal weights and works on its share of each batch."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from uni_instruct.engines.threads import usable_cpus
from uni_instruct.errors import RequestError
from uni_instruct.processes import is_later_process
from uni_instruct.train.config import LoopConfig, Recipe
from uni_instruct.train.optimization.precision import AUTOCASTS

Module = TypeVar("Module", bound=torch.nn.Module)
Given = TypeVar("Given")

# A run of fewer images is over before another process has loaded torch.
SHORT_KIMG = 20.0
# Below this many images a process spends as long in starting each layer as in computing it.
LEAST_SHARE = 16


def processes_for(recipe: Recipe) -> int:
    """How many processes train the recipe fastest where nobody says: on a CPU one a core, with a GPU one.

    A thread of torch waits for the others in every layer, a process only once a step. On two cores, two processes were 1.1 to
    1.8 times as fast as two threads; with a neighbour on one of the cores threads nearly stood still (benchmarks/processes.py).
    """
    if is_later_process():
        return int(os.environ["WORLD_SIZE"])  # the first process has decided
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return 1  # torchrun's number counts
    stages = [recipe.distillation] if recipe.teacher.bundle else [recipe.teacher, recipe.distillation]
    if torch.cuda.is_available() or sum(stage.duration_kimg for stage in stages) < SHORT_KIMG:
        return 1
    batches = (recipe.teacher.batch, recipe.distillation.batch)
    fitting = [n for n in range(1, usable_cpus() + 1) if all(batch % n == 0 and batch // n >= LEAST_SHARE for batch in batches)]
    return max(fitting, default=1)


def share_cpus(processes: int) -> None:
    """Gives each of the processes its part of the cores, in threads; must come before they are started."""
    if processes == 1 or is_later_process() or torch.cuda.is_available():
        return
    threads = max(1, usable_cpus() // processes)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # theirs
    torch.set_num_threads(threads)


def start_fabric(devices: int, precision: str) -> Fabric:
    """A launched Fabric on `devices` GPUs, or as many processes on the CPU. Raises RequestError for what this machine lacks.

    Under torchrun the processes are torchrun's, on any number of machines. Otherwise the other processes are started here, by
    running the same command again.
    """
    # torchrun has started the processes already; --devices would start as many again.
    launched = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 0
    devices = launched or devices
    if torch.cuda.is_available() and devices > torch.cuda.device_count():
        raise RequestError(
            f"--devices {devices} is more than the {torch.cuda.device_count()} GPUs of this machine",
            remedy="ask for fewer, or use torchrun on several machines",
            param="devices",
        )
    nodes = int(os.environ.get("WORLD_SIZE", "1")) // devices if launched else 1
    return _launch(precision, devices, nodes)


@contextmanager
def ended_together(fabric: Fabric) -> Iterator[None]:
    """Keeps the processes of fabric together to the block's end, and closes what connects them.

    A process that left earlier would take gloo's threads with it in the middle of their work, which aborts it; the first
    process is killed for that, whatever it is still writing.
    """
    try:
        yield
        fabric.barrier()
    finally:
        # gloo's threads would otherwise abort the process where the interpreter ends before them.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def gathered(fabric: Fabric, part: Given) -> list[Given]:
    """What each process gives, in their order, in the first process; in the others nothing."""
    if fabric.world_size == 1:
        return [part]
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.gather_object(part, parts if fabric.is_global_zero else None)
    return parts if fabric.is_global_zero else []


def lone_fabric(precision: str) -> Fabric:
    """A launched Fabric of this process alone, even where torchrun started it among others."""
    # Trials of speed are each process's own; a group of all would wait for those that make none.
    return _launch(precision, 1, 1)


def _launch(precision: str, devices: int, nodes: int) -> Fabric:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "16-mixed" and device == "cpu":
        raise RequestError("loop.precision 16-mixed needs a GPU", remedy="--set precision=bf16-mixed", param="precision")
    # It greets every launch on standard error.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        accelerator=device,
        devices=devices,
        num_nodes=nodes,
        strategy=_Replicas() if devices * nodes > 1 else "auto",
        # Autocast of our own, as Fabric's would round the inputs too.
        plugins=None if precision == "32-true" else [AUTOCASTS[precision](precision, device)],  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric


def prepared(module: Module, loop: LoopConfig) -> Module:
    """The module compiled, where the recipe asks for it, and in its memory format. The arithmetic stays the same."""
    module = arranged(module, loop)
    # Last, and in place: the compiled module keeps the names of its weights.
    if loop.compile:
        module.compile()
    return module


def arranged(module: Module, loop: LoopConfig) -> Module:
    """The module in the memory format that the recipe asks for."""
    if loop.channels_last is True:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


def check_batches(recipe: Recipe, processes: int) -> None:
    """Raises RequestError where so many processes cannot share out the batches of the stages that are trained equally."""
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
    """This process's part of every global batch, in micro-batches: slices of the global batch.

    micro_batch is the most images at once, 0 for the whole share. The processes divide the batch, as `check_batches` sees to.
    """

    def __init__(self, fabric: Fabric, batch: int, micro_batch: int):
        # Unequal shares would make a mean of means that is not the mean of the batch.
        assert batch % fabric.world_size == 0, "check_batches"
        local = batch // fabric.world_size
        # Every process draws for the whole batch and takes its slice, so that N processes see what one would.
        start = fabric.global_rank * local
        step = micro_batch or local
        self.whole = slice(start, start + local)
        self.micro_batches = [slice(at, min(at + step, start + local)) for at in range(start, start + local, step)]


class _Replicas(DDPStrategy):
    """Equal copies whose gradients `OptimizerStep` sums itself.

    Torch's wrapper would expect every forward pass to be followed by a backward pass into the same module; a generator's
    gradient runs through the frozen critic, which breaks that.
    """

    def setup_module(self, module: torch.nn.Module) -> Any:
        return module
