"""What sampling at scale costs beside the engine: `python benchmarks/sampling.py BUNDLE [--images 4000] [--engine onnx]`.

The bare engine in this process, `generate` alone, and `generate --workers 1` and `2`, in turns. Beside seconds it counts the
processors' own (user and system, of all processes): on a machine that others use, only these say what the work costs. One
thread each, so that two workers are two threads.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from machine import describe_machine

from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.generate import resolve_class_ids
from uni_instruct.noise import draw_inputs

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--engine", default="onnx")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    engine_alone = bare_engine(options.bundle, options.engine)
    ways: dict[str, Callable[[int], None]] = {
        "bare engine": engine_alone,
        "generate": lambda count: generate(options, count),
        "generate --workers 1": lambda count: generate(options, count, "--workers", "1"),
        "generate --workers 2": lambda count: generate(options, count, "--workers", "2"),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, make in ways.items():
            # Of two sizes the difference: starting a process costs the same for both.
            found[name].append(per_image(make, options.images))
    report = {
        name: {"ms_an_image": round(1e3 * wall, 3), "cpu_ms_an_image": round(1e3 * cpu, 3)}
        for name, rounds in found.items()
        for wall, cpu in [[statistics.median(column) for column in zip(*rounds, strict=True)]]
    }
    print(json.dumps({**report, **vars(options), **describe_machine()}, indent=2))


def per_image(make: Callable[[int], None], images: int) -> tuple[float, float]:
    """Seconds, and the processors' seconds, that one more image takes."""
    few, many = measured(make, images // 4), measured(make, images)
    return tuple((b - a) / (images - images // 4) for a, b in zip(few, many, strict=True))  # type: ignore[return-value]


def measured(make: Callable[[int], None], images: int) -> tuple[float, float]:
    start, before = time.perf_counter(), spent()
    make(images)
    return time.perf_counter() - start, spent() - before


def spent() -> float:
    """Of this process and of those that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def bare_engine(name: str, engine: str) -> Callable[[int], None]:
    bundle = Bundle.open(name)
    opened = open_engine(bundle, engine)

    seeds = list(range(BATCH))
    inputs = draw_inputs(bundle.spec, seeds, resolve_class_ids(bundle.spec, seeds))

    def make(count: int) -> None:
        for _ in range(count // BATCH):
            opened(*inputs)

    return make


def generate(options: argparse.Namespace, count: int, *more: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "uni_instruct", "generate", options.bundle, "--engine", options.engine]
        command += ["--seeds", f"0-{count - 1}", "--batch", str(BATCH), "--out", str(Path(folder) / "out.npz"), *more]
        subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    main()
