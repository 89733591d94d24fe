"""How many processes train fastest on this machine's cores: `python benchmarks/processes.py digits [--busy] [--rounds 3]`.

Trains a recipe's teacher by `uni-instruct train` for some seconds in each of three ways, which take turns: one process with a
thread for each core, one process of one thread, and what the command does by itself (a process for each core). With --busy
every round is taken twice, alone and beside a process that spins. Speeds are images a second, medians of the log's lines after
the first; nothing is scored. The recipe's data must be at hand.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from machine import describe_machine
from recipe_speed import spinning_process

WAYS = {
    "a thread for each core": ({}, ["--devices", "1"]),
    "one thread": ({"OMP_NUM_THREADS": "1"}, ["--devices", "1"]),
    "a process for each core": ({}, []),
}
SETTINGS = ["loop.metric=none", "loop.trackers=[]", "teacher.evaluate_kimg=1e6"]
WARM_UP_LINES = 1
WAIT_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lines", type=int, default=4, help="lines of the log that count, of --kimg each")
    parser.add_argument("--kimg", type=float, default=1.28, help="images between two lines of the log, in thousands")
    parser.add_argument("--busy", action="store_true", help="beside a process that spins, too")
    options = parser.parse_args()
    conditions = ("idle", "busy") if options.busy else ("idle",)
    speeds = {condition: {way: list[float]() for way in WAYS} for condition in conditions}
    for _, condition, way in itertools.product(range(options.rounds), conditions, WAYS):
        with spinning_process() if condition == "busy" else nullcontext():
            speeds[condition][way] += images_per_s(options.recipe, way, options.lines, options.kimg)
    medians = {c: {way: round(statistics.median(v), 1) for way, v in ways.items()} for c, ways in speeds.items()}
    first = next(iter(WAYS))
    result = {
        "recipe": options.recipe,
        "images_per_s": medians,
        "ratio": {c: {way: round(v / ways[first], 2) for way, v in ways.items()} for c, ways in medians.items()},
        "machine": describe_machine(),
    }
    print(json.dumps(result, indent=2))


def images_per_s(recipe: str, way: str, lines: int, kimg: float) -> list[float]:
    """The speeds that a training logs, line by line, until there are as many as asked for."""
    environment, arguments = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = ["train", recipe, f"loop.log_kimg={kimg}", *SETTINGS, "--out", str(out), *arguments]
        process = subprocess.Popen(
            [sys.executable, "-m", "uni_instruct", *command],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        started = time.monotonic()
        while len(speeds := logged(out / "log.jsonl")) < WARM_UP_LINES + lines:
            if process.poll() is not None or time.monotonic() - started > WAIT_S:
                process.kill()
                sys.exit(f"uni-instruct {' '.join(command)} did not train (exit code {process.poll()})")
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.wait()
    return speeds[WARM_UP_LINES:]


def logged(file: Path) -> list[float]:
    records = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return [record["images_per_s"] for record in records if record.get("stage") == "teacher" and "images_per_s" in record]


if __name__ == "__main__":
    main()
