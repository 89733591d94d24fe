"""`auto`: what this machine multiplies fastest, measured in seconds on the network that is going to be trained."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from uni_instruct.engines.hardware.threads import one_torch_thread
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.files import atomic_file
from uni_instruct.networks.build import build_denoiser
from uni_instruct.processes import is_nonzero_rank
from uni_instruct.progress import ProgressFactory, progress, silent
from uni_instruct.spec import ModelSpec
from uni_instruct.train.config import AUTO, LoopConfig
from uni_instruct.train.optimization.distributed import compiled_as_asked, single_process_fabric
from uni_instruct.train.optimization.precision import arithmetic_of
from uni_instruct.train.recipe import parse_recipe, read_yaml
from uni_instruct.train.rng import initial_weights

# Timings on a shared machine vary by as much, so a smaller gain does not justify leaving float32.
MIN_SPEEDUP = 1.2
ROUNDS = 3
# So many images that a step takes about this long, whatever the network.
STEP_S, MAX_TIMED_IMAGES = 0.5, 32
TIMEOUT_S = 600.0


class PrecisionChoice(NamedTuple):
    """How a network is run: the precision of its products, and whether its images are in channels_last."""

    precision: str
    channels_last: bool

    def __str__(self) -> str:
        return f"{self.precision}, channels_last {str(self.channels_last).lower()}"


def is_precision_resolved(loop: LoopConfig) -> bool:
    """Whether nothing is left to choose."""
    return AUTO not in (loop.precision, loop.channels_last)


def exact(loop: LoopConfig) -> LoopConfig:
    """loop with `auto` replaced by what every machine can do, measuring nothing."""
    precision = "32-true" if loop.precision == AUTO else loop.precision
    return replace(loop, precision=precision, channels_last=loop.channels_last is True)


def resolve_precision(loop: LoopConfig, spec: ModelSpec, images: int, *, shown: bool = True) -> LoopConfig:
    """loop with `auto` replaced by what takes the least time here for a training step of the spec's network.

    images: the most that a process takes at once; no more than MAX_TIMED_IMAGES are timed.
    """
    if is_precision_resolved(loop):
        return loop
    choices = [
        choice
        for choice in _choices()
        if loop.precision in (AUTO, choice.precision) and loop.channels_last in (AUTO, choice.channels_last)
    ]
    if loop.precision not in (AUTO, *(choice.precision for choice in choices)):  # start_fabric says why
        choices = [PrecisionChoice(loop.precision, False)]
    best = _measured(choices, spec, images, progress if shown else silent) if len(choices) > 1 else choices[0]
    return replace(loop, precision=best.precision, channels_last=best.channels_last)


def _measured(choices: list[PrecisionChoice], spec: ModelSpec, most: int, with_progress: ProgressFactory) -> PrecisionChoice:
    times = dict.fromkeys(choices, float("inf"))
    # Round by round: another process on the machine then slows all choices alike. The best time of each counts.
    trials = [choice for _ in range(ROUNDS) for choice in choices]
    # One thread ranks the choices as many do, and does not wait for others when another process is busy.
    with one_torch_thread(), with_progress("precision: what is fastest here", len(trials), "trials") as bar:
        # One image first: how many take STEP_S on this machine is not known before.
        images = round(min(most, MAX_TIMED_IMAGES, max(1.0, STEP_S / _step_s(spec, choices[0], 1))))
        for number, choice in enumerate(trials):
            times[choice] = min(times[choice], _step_s(spec, choice, images))
            bar.advance(1, _verdict(times, images) if number == len(trials) - 1 else None)
    return _fastest(times)


def resolve_precision_for_run(loop: LoopConfig, spec: ModelSpec, images: int, folder: Path) -> LoopConfig:
    """As `resolve_precision`, once per run: rank 0 measures and writes the result, other ranks and resumed runs read it.

    Raises RequestError where the first process's note does not come.
    """
    if is_precision_resolved(loop):
        return loop
    recipe, file = folder / "recipe.yaml", folder / "state" / "fastest.json"
    if recipe.exists():  # a run that is resumed keeps what it began with
        begun = parse_recipe(read_yaml(recipe)).loop
        if is_precision_resolved(begun):
            return _filled(loop, begun.precision, begun.channels_last)
    # Two processes that measured for themselves could come to two precisions, and to weights that differ.
    first = not is_nonzero_rank()
    if first and not file.exists():
        chosen = resolve_precision(loop, spec, images)
        with atomic_file(file) as partial:
            partial.write_text(json.dumps({"precision": chosen.precision, "channels_last": chosen.channels_last}))
    waited = time.monotonic()
    while not file.exists():
        if time.monotonic() - waited > TIMEOUT_S:
            raise RequestError(
                f"{file} was not written by the first process",
                remedy="give --out a folder that all processes share",
                param="out",
            )
        time.sleep(0.1)
    try:
        noted = json.loads(file.read_text())
        return _filled(loop, noted["precision"], noted["channels_last"])
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{file} cannot be read", remedy="delete it, and run the same command again") from error


def _filled(loop: LoopConfig, precision: str, channels_last: bool | str) -> LoopConfig:
    """loop with its `auto` replaced by these."""
    return replace(
        loop,
        precision=precision if loop.precision == AUTO else loop.precision,
        channels_last=channels_last if loop.channels_last == AUTO else loop.channels_last,
    )


def _choices() -> list[PrecisionChoice]:
    """The exact one first."""
    exact = [PrecisionChoice("32-true", False), PrecisionChoice("32-true", True)]
    if not torch.cuda.is_available():
        return [*exact, PrecisionChoice("bf16-mixed", True)]
    # Before Ampere bfloat16 is emulated, and slower than float32.
    half = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return [*exact, PrecisionChoice(half, False), PrecisionChoice(half, True)]


def _fastest(times: dict[PrecisionChoice, float]) -> PrecisionChoice:
    exact, best = next(iter(times)), min(times, key=lambda choice: times[choice])
    return best if times[best] * MIN_SPEEDUP < times[exact] else exact


def _verdict(times: dict[PrecisionChoice, float], images: int) -> str:
    speeds = "; ".join(f"{choice}: {images / seconds:.0f}" for choice, seconds in times.items())
    return f"{_fastest(times)} (images/s: {speeds})"


def _step_s(spec: ModelSpec, choice: PrecisionChoice, images: int) -> float:
    """Seconds of a forward and a backward pass, after one that does not count."""
    fabric = single_process_fabric(choice.precision)
    loop = LoopConfig(precision=choice.precision, channels_last=choice.channels_last)
    denoiser = initial_weights(lambda: build_denoiser(spec), 0).to(fabric.device)
    network = fabric.setup_module(compiled_as_asked(denoiser.train(), loop))
    noised = torch.randn(images, *spec.noise_shape, generator=torch.Generator().manual_seed(0)).to(fabric.device)
    class_ids = torch.zeros(images, dtype=torch.int64, device=fabric.device) if spec.num_classes else None
    sigma = torch.ones(images, 1, 1, 1, device=fabric.device)
    # The first pass compiles kernels and finds algorithms; the second one's time is returned.
    for _ in range(2):
        start = time.perf_counter()
        with arithmetic_of(choice.precision):
            fabric.backward(network(noised, sigma, class_ids).square().mean())
        network.zero_grad()
        if fabric.device.type == "cuda":
            # Kernels are only queued when their calls return.
            torch.cuda.synchronize()
    return time.perf_counter() - start
