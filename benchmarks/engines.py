"""How fast each engine is, as a ratio to torch eager, and whether its images depend on the batch size.

`python benchmarks/engines.py [BUNDLE | --network digits|fashion|cifar10|adm64] [--rounds 5]`: without a bundle, a generator
of random weights and that shape is exported to every target first. The engines take turns, round by round, on the same
machine; ratios are medians over the rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import describe_machine

from uni_instruct.bundle import Bundle
from uni_instruct.engine import TORCH, Engine, available_engines, open_engine
from uni_instruct.export.targets import Target, export_engine, targets_here
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.networks.build import build_denoiser
from uni_instruct.noise import draw_inputs
from uni_instruct.spec import ModelSpec

BATCHES = (1, 16, 64)
INVARIANCE_BATCHES = (1, 2, 3, 7, 16, 64)
MIN_SECONDS = 0.3  # of calls, for one figure


class Shape(NamedTuple):
    """A generator of random weights: its images [C, H, W], its network, its classes."""

    image: tuple[int, int, int]
    network_args: dict[str, Any]
    network: str = "ddpmpp"
    num_classes: int = 10


NETWORKS = {
    "small": Shape((3, 32, 32), {"model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []}),
    "digits": Shape((1, 8, 8), {"model_channels": 32, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4]}),
    "fashion": Shape((1, 28, 28), {"model_channels": 32, "channel_mult": [1, 2, 2], "num_blocks": 1, "attn_resolutions": [14]}),
    "cifar10": Shape(
        (3, 32, 32), {"model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4, "attn_resolutions": [16]}
    ),
    # ImageNet's, 295 million parameters.
    "adm64": Shape(
        (3, 64, 64),
        {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [32, 16, 8]},
        network="adm",
        num_classes=1000,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--network", choices=NETWORKS, default="digits", help="where no bundle is given")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Bundle.open(options.bundle) if options.bundle else random_bundle(options.network, Path(scratch) / "bundle")
        engines = {str(engine_id): open_engine(bundle, engine_id) for engine_id in available_engines(bundle)}
        result = {
            "generator": bundle.spec.name,
            "parameters": sum(array.size for array in bundle.weights().values()),
            "speed": speed(engines, options.rounds),
            "equal_to_batch_1": {name: equal_to_batch_1(engine) for name, engine in engines.items()},
            "machine": describe_machine(),
        }
    print(json.dumps(result, indent=2))


def random_bundle(network: str, path: Path, targets: Sequence[Target] | None = None) -> Bundle:
    """A conditional generator with every weight drawn at random, exported to those targets, or to all for this machine."""
    shape = NETWORKS[network]
    spec = ModelSpec(
        name=f"random-{network}",
        noise_shape=shape.image,
        num_classes=shape.num_classes,
        network=shape.network,
        network_args=shape.network_args,
    )
    rng = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in build_denoiser(spec).state_dict().items():
        # EDM starts its last convolutions near zero: a trained network's are not.
        z = torch.randn(tensor.shape, generator=rng) / max(tensor[0].numel(), 1) ** 0.5
        weights[name] = (tensor if "resample" in name or tensor.dim() < 2 else z).numpy()
    bundle = Bundle.write(path, spec, weights, card="")
    for target in targets_here() if targets is None else targets:
        export_engine(bundle, str(target.engine_id))
    return bundle


def speed(engines: dict[str, Engine], rounds: int) -> list[dict[str, object]]:
    """A row for each engine and batch size: median latency, images per second, and the ratio to torch's."""
    seconds: dict[tuple[str, int], list[float]] = {(name, batch): [] for name in engines for batch in BATCHES}
    for _ in range(rounds):
        for name, batch in seconds:
            seconds[name, batch].append(seconds_per_call(engines[name], batch))
    rows = []
    for (name, batch), own in seconds.items():
        ratios = [eager / time_s for eager, time_s in zip(seconds[str(TORCH), batch], own, strict=True)]
        rows.append(
            {
                "engine": name,
                "batch": batch,
                "latency_ms": round(statistics.median(own) * 1e3, 2),
                "images_per_s": round(batch / statistics.median(own), 1),
                "to_torch_eager": round(statistics.median(ratios), 2),
            }
        )
    return rows


def seconds_per_call(engine: Engine, batch: int) -> float:
    """Median over the calls of at least MIN_SECONDS, after one that is not counted."""
    inputs = draw_inputs(engine.spec, range(batch), resolve_class_ids(engine.spec, range(batch)))
    engine(*inputs)
    times: list[float] = []
    while sum(times) < MIN_SECONDS:
        start = time.perf_counter()
        engine(*inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def equal_to_batch_1(engine: Engine) -> dict[int, dict[str, float]]:
    """For each batch size, the share of images that are byte for byte those of batch size 1, and the same of pixels."""
    seeds = range(max(INVARIANCE_BATCHES))
    class_ids = resolve_class_ids(engine.spec, seeds)
    images = {batch: generate_images(engine, seeds, class_ids, batch) for batch in INVARIANCE_BATCHES}
    equal = {batch: found == images[1] for batch, found in images.items()}
    return {
        batch: {"images": float(same.all(axis=(1, 2, 3)).mean()), "pixels": float(np.round(same.mean(), 6))}
        for batch, same in equal.items()
    }


if __name__ == "__main__":
    main()
