"""How much memory sampling and scoring take, however many images: `python benchmarks/memory.py [--images 1000000]`.

A small generator of 32x32 in colour and ten classes, of random weights, makes so many images into an .npz, a zip, tar shards
and a folder of PNGs, and `evaluate` scores as many against 5,000 of its own of other seeds. Each is a command of its own; the
peak is that of the command and its workers together, looked at twice a second. The distance is near 0, or something is wrong.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
from engines import random_bundle
from machine import describe_machine

from uni_instruct.export.targets import TARGETS

LOOK_S = 0.5
REFERENCE = 5000
# The reference's seeds begin where no sample's do.
REFERENCE_SEED = 10_000_000
FORMS = ("samples.npz", "samples.zip", "samples.wds", "samples")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", choices=(*FORMS, "evaluate"), nargs="+", default=(*FORMS, "evaluate"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = str(random_bundle("small", folder / "bundle", targets=[TARGETS["onnx-fp32"]]).path)
        found = {}
        for name in options.only:
            found[name] = score(bundle, options, folder) if name == "evaluate" else sample(bundle, options, folder / name)
    print(json.dumps({**found, **vars(options), "machine": describe_machine()}, indent=2))


def sample(bundle: str, options: argparse.Namespace, out: Path) -> dict[str, object]:
    words = ["--seeds", f"0-{options.images - 1}", "--workers", str(options.workers), "--out", str(out)]
    return run(["generate", bundle, *words])


def score(bundle: str, options: argparse.Namespace, folder: Path) -> dict[str, object]:
    reference = folder / "reference.npz"
    run(["generate", bundle, "--seeds", f"{REFERENCE_SEED}-{REFERENCE_SEED + REFERENCE - 1}", "--out", str(reference)])
    words = ["--reference", str(reference), "--extractor", "classifier", "--metrics", "fd", "--sets", "1", "--json"]
    words += ["--seeds", f"0-{options.images - 1}", "--workers", str(options.workers)]
    return run(["evaluate", bundle, *words])


def run(words: Sequence[str]) -> dict[str, object]:
    """Seconds, and the peak of memory, of a command and its workers; and what it prints, if that is JSON."""
    start, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-m", "uni_instruct", *words], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(LOOK_S)
        printed = process.stdout.read() if process.stdout else ""
    if process.returncode:
        sys.exit(f"{' '.join(words)} ended with {process.returncode}")
    seen: dict[str, object] = {"peak_mb": round(peak / 1e6), "seconds": round(time.perf_counter() - start, 1)}
    with contextlib.suppress(ValueError):
        seen["scores"] = json.loads(printed)
    return seen


def memory_of(pid: int) -> int:
    """Bytes of a process and all below it; pages that they share are counted once (PSS)."""
    total = 0
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


if __name__ == "__main__":
    main()
