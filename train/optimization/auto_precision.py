"""`auto`: what this machine multiplies fastest, measured in seconds on the network that is going to be trained."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from uni_instruct.engines.threads import one_torch_thread
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.files import JSON_ERRORS, atomic_file
from uni_instruct.networks.build import build_denoiser
from uni_instruct.processes import is_later_process
from uni_instruct.progress import ProgressFactory, progress, silent
from uni_instruct.spec import ModelSpec
from uni_instruct.train.config import AUTO, LoopConfig
from uni_instruct.train.optimization.distributed import lone_fabric, prepared
from uni_instruct.train.optimization.precision import arithmetic_of
from uni_instruct.train.recipe import parse_recipe, read_yaml
from uni_instruct.train.rng import initial_weights

# Timings on a shared machine differ by as much, and the exact way is the one that needs no explaining.
WORTH = 1.2
ROUNDS = 3
# So many images that a step takes about this long, whatever the network.
STEP_S, MOST_IMAGES = 0.5, 32
PATIENCE_S = 600.0


class Way(NamedTuple):
    """How a network is run: the precision of its products, and whether its images are in channels_last."""

    precision: str
    channels_last: bool

    def __str__(self) -> str:
        return f"{self.precision}, channels_last {str(self.channels_last).lower()}"


def is_settled(loop: LoopConfig) -> bool:
    """Whether nothing is left to choose."""
    return AUTO not in (loop.precision, loop.channels_last)


def exact(loop: LoopConfig) -> LoopConfig:
    """loop with `auto` replaced by what every machine can do, measuring nothing."""
    precision = "32-true" if loop.precision == AUTO else loop.precision
    return replace(loop, precision=precision, channels_last=loop.channels_last is True)


def settled(loop: LoopConfig, spec: ModelSpec, images: int, *, shown: bool = True) -> LoopConfig:
    """loop with `auto` replaced by what takes the least time here for a training step of the spec's network.

    images: the most that a process takes at once; no more than MOST_IMAGES are timed.
    """
    if is_settled(loop):
        return loop
    ways = [
        way for way in _ways() if loop.precision in (AUTO, way.precision) and loop.channels_last in (AUTO, way.channels_last)
    ]
    if loop.precision not in (AUTO, *(way.precision for way in ways)):  # start_fabric says why
        ways = [Way(loop.precision, False)]
    best = _measured(ways, spec, images, progress if shown else silent) if len(ways) > 1 else ways[0]
    return replace(loop, precision=best.precision, channels_last=best.channels_last)


def _measured(ways: list[Way], spec: ModelSpec, most: int, with_progress: ProgressFactory) -> Way:
    times = dict.fromkeys(ways, float("inf"))
    # Round by round, so that a neighbour on the machine slows all ways and not the one that was on; the best of each counts.
    trials = [way for _ in range(ROUNDS) for way in ways]
    # What one thread multiplies fastest, all do. Several wait for each other beside a busy neighbour, in some ways most of all.
    with one_torch_thread(), with_progress("precision: what is fastest here", len(trials), "trials") as bar:
        # One image first: how many take STEP_S on this machine is not known before.
        images = round(min(most, MOST_IMAGES, max(1.0, STEP_S / _step_s(spec, ways[0], 1))))
        for number, way in enumerate(trials):
            times[way] = min(times[way], _step_s(spec, way, images))
            bar.advance(1, _verdict(times, images) if number == len(trials) - 1 else None)
    return _fastest(times)


def settle_for_run(loop: LoopConfig, spec: ModelSpec, images: int, folder: Path) -> LoopConfig:
    """As `settled`, once for a run: its first process measures and notes it, later processes and resumed runs read that.

    Raises RequestError where the first process's note does not come.
    """
    if is_settled(loop):
        return loop
    recipe, file = folder / "recipe.yaml", folder / "state" / "fastest.json"
    if recipe.exists():  # a run that is resumed keeps what it began with
        begun = parse_recipe(read_yaml(recipe)).loop
        if is_settled(begun):
            return _filled(loop, begun.precision, begun.channels_last)
    # Two processes that measured for themselves could come to two precisions, and to weights that differ.
    first = not is_later_process()
    if first and not file.exists():
        chosen = settled(loop, spec, images)
        with atomic_file(file) as partial:
            partial.write_text(json.dumps({"precision": chosen.precision, "channels_last": chosen.channels_last}))
    waited = time.monotonic()
    while not file.exists():
        if time.monotonic() - waited > PATIENCE_S:
            raise RequestError(
                f"{file} was not written by the first process",
                remedy="give --out a folder that all processes share",
                param="out",
            )
        time.sleep(0.1)
    try:
        noted = json.loads(file.read_text())
        return _filled(loop, noted["precision"], noted["channels_last"])
    except (*JSON_ERRORS, KeyError, TypeError) as error:
        raise FileFormatError(f"{file} cannot be read", remedy="delete it, and run the same command again") from error


def _filled(loop: LoopConfig, precision: str, channels_last: bool | str) -> LoopConfig:
    """loop with its `auto` replaced by these."""
    return replace(
        loop,
        precision=precision if loop.precision == AUTO else loop.precision,
        channels_last=channels_last if loop.channels_last == AUTO else loop.channels_last,
    )


def _ways() -> list[Way]:
    """The exact one first."""
    exact = [Way("32-true", False), Way("32-true", True)]
    if not torch.cuda.is_available():
        return [*exact, Way("bf16-mixed", True)]
    # Before Ampere bfloat16 is emulated, and slower than float32.
    half = "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
    return [*exact, Way(half, False), Way(half, True)]


def _fastest(times: dict[Way, float]) -> Way:
    exact, best = next(iter(times)), min(times, key=lambda way: times[way])
    return best if times[best] * WORTH < times[exact] else exact


def _verdict(times: dict[Way, float], images: int) -> str:
    speeds = "; ".join(f"{way}: {images / seconds:.0f}" for way, seconds in times.items())
    return f"{_fastest(times)} (images/s: {speeds})"


def _step_s(spec: ModelSpec, way: Way, images: int) -> float:
    """Seconds of a forward and a backward pass, after one that does not count."""
    fabric = lone_fabric(way.precision)
    loop = LoopConfig(precision=way.precision, channels_last=way.channels_last)
    denoiser = initial_weights(lambda: build_denoiser(spec), 0).to(fabric.device)
    network = fabric.setup_module(prepared(denoiser.train(), loop))
    noised = torch.randn(images, *spec.noise_shape, generator=torch.Generator().manual_seed(0)).to(fabric.device)
    class_ids = torch.zeros(images, dtype=torch.int64, device=fabric.device) if spec.num_classes else None
    sigma = torch.ones(images, 1, 1, 1, device=fabric.device)
    # The first pass compiles kernels and finds algorithms; the second one's time is returned.
    for _ in range(2):
        start = time.perf_counter()
        with arithmetic_of(way.precision):
            fabric.backward(network(noised, sigma, class_ids).square().mean())
        network.zero_grad()
        if fabric.device.type == "cuda":
            # Kernels are only queued when their calls return.
            torch.cuda.synchronize()
    return time.perf_counter() - start
