"""`auto` for loop.precision and loop.channels_last: the fastest choice, timed here on the network that will be trained."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from uni_instruct.engines.hardware.threads import one_torch_thread
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.networks.build import build_denoiser
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import JSON_ERRORS, atomic_file
from uni_instruct.system.processes import is_nonzero_rank
from uni_instruct.system.progress import ProgressFactory, progress, silent
from uni_instruct.train.config import AUTO, LoopConfig
from uni_instruct.train.optimization.distributed import compiled_as_asked, single_process_fabric
from uni_instruct.train.optimization.precision import arithmetic_of
from uni_instruct.train.recipe import parse_recipe, read_yaml
from uni_instruct.train.rng import initial_weights

# Timings on a shared machine vary by about this factor. A smaller gain does not justify leaving float32.
MIN_SPEEDUP = 1.2
ROUNDS = 3
# The number of images is chosen so that a timed step takes about STEP_S, whatever the network; never more than 32.
STEP_S, MAX_TIMED_IMAGES = 0.5, 32
TIMEOUT_S = 600.0  # how long other ranks wait for rank 0's choice


class PrecisionChoice(NamedTuple):
    """How a network is run: the precision of its matrix products, and whether its memory format is channels_last."""

    precision: str
    channels_last: bool

    def __str__(self) -> str:
        return f"{self.precision}, channels_last {str(self.channels_last).lower()}"


def is_precision_resolved(loop: LoopConfig) -> bool:
    """Whether neither precision nor channels_last is `auto`."""
    return AUTO not in (loop.precision, loop.channels_last)


def exact(loop: LoopConfig) -> LoopConfig:
    """loop with `auto` replaced by what every machine supports (32-true, not channels_last). Measures nothing."""
    precision = "32-true" if loop.precision == AUTO else loop.precision
    return replace(loop, precision=precision, channels_last=loop.channels_last is True)


def resolve_precision(loop: LoopConfig, spec: ModelSpec, images: int, *, shown: bool = True) -> LoopConfig:
    """loop with `auto` replaced by the choice with the fastest training step of the spec's network on this machine.

    images: the largest micro-batch of a process; at most MAX_TIMED_IMAGES are timed. shown: whether to show a progress bar.
    """
    if is_precision_resolved(loop):
        return loop
    choices = [
        choice
        for choice in _choices()
        if loop.precision in (AUTO, choice.precision) and loop.channels_last in (AUTO, choice.channels_last)
    ]
    if loop.precision not in (AUTO, *(choice.precision for choice in choices)):  # on a CPU, start_fabric refuses 16-mixed
        choices = [PrecisionChoice(loop.precision, False)]
    best = _measured(choices, spec, images, progress if shown else silent) if len(choices) > 1 else choices[0]
    return replace(loop, precision=best.precision, channels_last=best.channels_last)


def _measured(choices: list[PrecisionChoice], spec: ModelSpec, most: int, with_progress: ProgressFactory) -> PrecisionChoice:
    times = dict.fromkeys(choices, float("inf"))
    # All choices in each round, so that another busy process slows all of them alike. Each choice's best time counts.
    trials = [choice for _ in range(ROUNDS) for choice in choices]
    # With one thread the choices rank as with many, and the timing does not depend on threads that other processes delay.
    with one_torch_thread(), with_progress("precision: measuring the fastest", len(trials), "trials") as bar:
        # One image first, to estimate how many images take STEP_S on this machine.
        images = round(min(most, MAX_TIMED_IMAGES, max(1.0, STEP_S / _step_s(spec, choices[0], 1))))
        for number, choice in enumerate(trials):
            times[choice] = min(times[choice], _step_s(spec, choice, images))
            bar.advance(1, _verdict(times, images) if number == len(trials) - 1 else None)
    return _fastest(times)


def resolve_precision_for_run(loop: LoopConfig, spec: ModelSpec, images: int, folder: Path) -> LoopConfig:
    """As `resolve_precision`, once per run: rank 0 measures and writes the result, other ranks and resumed runs read it.

    Raises RequestError if rank 0's result does not appear within TIMEOUT_S, FileFormatError if it cannot be read.
    """
    if is_precision_resolved(loop):
        return loop
    recipe, file = folder / "recipe.yaml", folder / "state" / "fastest.json"
    if recipe.exists():  # a resumed run keeps the precision that it was started with
        begun = parse_recipe(read_yaml(recipe)).loop
        if is_precision_resolved(begun):
            return _replace_auto(loop, begun.precision, begun.channels_last)
    # If each process measured for itself, they could choose different precisions, and their weights would diverge.
    first = not is_nonzero_rank()
    if first and not file.exists():
        chosen = resolve_precision(loop, spec, images)
        with atomic_file(file) as partial:
            partial.write_text(json.dumps({"precision": chosen.precision, "channels_last": chosen.channels_last}))
    waited = time.monotonic()
    while not file.exists():
        if time.monotonic() - waited > TIMEOUT_S:
            raise RequestError(
                f"{file} was not written by rank 0 within {TIMEOUT_S:.0f} s",
                remedy="give --out a folder that all processes share",
                param="out",
            )
        time.sleep(0.1)
    try:
        noted = json.loads(file.read_text())
        return _replace_auto(loop, noted["precision"], noted["channels_last"])
    except (*JSON_ERRORS, KeyError, TypeError) as error:
        raise FileFormatError(f"{file} cannot be read", remedy="delete that file and run the same command again") from error


def _replace_auto(loop: LoopConfig, precision: str, channels_last: bool | str) -> LoopConfig:
    """loop with `auto` replaced by these values; keys that are not `auto` stay."""
    return replace(
        loop,
        precision=precision if loop.precision == AUTO else loop.precision,
        channels_last=channels_last if loop.channels_last == AUTO else loop.channels_last,
    )


def _choices() -> list[PrecisionChoice]:
    """The candidates on this machine. The first one is exact: the fallback of `_fastest`."""
    exact = [PrecisionChoice("32-true", False), PrecisionChoice("32-true", True)]
    if not torch.cuda.is_available():
        return [*exact, PrecisionChoice("bf16-mixed", True)]
    # GPUs before Ampere emulate bfloat16, which is slower than float32.
    half = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return [*exact, PrecisionChoice(half, False), PrecisionChoice(half, True)]


def _fastest(times: dict[PrecisionChoice, float]) -> PrecisionChoice:
    exact, best = next(iter(times)), min(times, key=lambda choice: times[choice])
    return best if times[best] * MIN_SPEEDUP < times[exact] else exact


def _verdict(times: dict[PrecisionChoice, float], images: int) -> str:
    speeds = "; ".join(f"{choice}: {images / seconds:.0f}" for choice, seconds in times.items())
    return f"{_fastest(times)} (images/s: {speeds})"


def _step_s(spec: ModelSpec, choice: PrecisionChoice, images: int) -> float:
    """Seconds of a forward and a backward pass, after one pass of warm-up."""
    fabric = single_process_fabric(choice.precision)
    loop = LoopConfig(precision=choice.precision, channels_last=choice.channels_last)
    denoiser = initial_weights(lambda: build_denoiser(spec), 0).to(fabric.device)
    network = fabric.setup_module(compiled_as_asked(denoiser.train(), loop))
    noised = torch.randn(images, *spec.noise_shape, generator=torch.Generator().manual_seed(0)).to(fabric.device)
    class_ids = torch.zeros(images, dtype=torch.int64, device=fabric.device) if spec.num_classes else None
    sigma = torch.ones(images, 1, 1, 1, device=fabric.device)
    # The first pass compiles kernels and selects algorithms. The time of the second pass is returned.
    for _ in range(2):
        start = time.perf_counter()
        with arithmetic_of(choice.precision):
            fabric.backward(network(noised, sigma, class_ids).square().mean())
        network.zero_grad()
        if fabric.device.type == "cuda":
            # CUDA calls return when a kernel is queued, not when it has run.
            torch.cuda.synchronize()
    return time.perf_counter() - start
