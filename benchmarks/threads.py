"""What it costs and gains that ONNX Runtime's threads spin while they wait for each other.

`python benchmarks/threads.py [BUNDLE] [--busy 0,1] [--rounds 9]`: engines with and without spinning take turns, round by round,
alone and beside that many processes that do nothing but count; figures are medians over the rounds. The machine's own load is
printed with them: on one that has other work, "beside 0" is no idle machine.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from engines import BATCHES, seconds_per_call
from machine import describe_machine

from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.engines.threads import usable_cpus


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="digits")
    parser.add_argument("--busy", default="0,1", help="numbers of processes beside it")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    bundle, rows = Bundle.open(options.bundle), []
    load = os.getloadavg()[0]
    for count in map(int, options.busy.split(",")):
        with busy_processes(count):
            rows += [{"beside": count, **row} for row in measure(bundle, options.rounds)]
    result = {"generator": bundle.spec.name, "threads": usable_cpus(), "load_before": load, "rows": rows}
    print(json.dumps({**result, "machine": describe_machine()}, indent=2))


def measure(bundle: Bundle, rounds: int) -> list[dict[str, object]]:
    """For each batch size: images a second with and without spinning, and the median ratio of the two in one round."""
    engines = {spin: open_engine(bundle, "onnx", spin=spin) for spin in (True, False)}
    rates: dict[tuple[bool, int], list[float]] = {(spin, batch): [] for spin in engines for batch in BATCHES}
    for _ in range(rounds):
        for batch in BATCHES:
            for spin, engine in engines.items():
                rates[spin, batch].append(batch / seconds_per_call(engine, batch))
    return [
        {
            "batch": batch,
            "spinning": round(statistics.median(rates[True, batch]), 1),
            "not_spinning": round(statistics.median(rates[False, batch]), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(rates[True, batch], rates[False, batch], strict=True)), 2),
        }
        for batch in BATCHES
    ]


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Within, that many other processes want a core each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main()
