"""How long a newcomer waits, and what they get: `python benchmarks/quickstart.py [--out DIR]`.

Runs `uni-instruct quickstart` as a process in an empty folder and measures the time to the first served image, the time from
Ctrl-C to the end of the last process, the scores of student and teacher, and `uni-instruct --help`.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from machine import describe_machine

CLI = [sys.executable, "-m", "uni_instruct"]
PORT = 3917


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="keep the run here")
    out = parser.parse_args().out or Path(tempfile.mkdtemp()) / "quickstart"
    result = {
        "help_s": time_help(),
        **time_quickstart(out),
        "scores": evaluate(out),
        "machine": describe_machine(),
    }
    print(json.dumps(result, indent=2))


def time_help(runs: int = 9) -> dict[str, float]:
    """Wall time of `uni-instruct --help`."""
    times = []
    for _ in range(runs):
        start = time.monotonic()
        subprocess.run([*CLI, "--help"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.monotonic() - start)
    return {"median": statistics.median(times), "max": max(times)}


def time_quickstart(out: Path) -> dict[str, float]:
    """Seconds to the first PNG over HTTP, and from Ctrl-C to the end."""
    start = time.monotonic()
    process = subprocess.Popen([*CLI, "quickstart", "--out", str(out), "--port", str(PORT)], stdout=sys.stderr)
    while first_image() is None:
        if process.poll() is not None:
            sys.exit(f"quickstart ended with exit code {process.returncode}")
        time.sleep(0.1)
    served = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.wait()
    return {"first_served_image_s": served - start, "stop_s": time.monotonic() - served}


def first_image() -> bytes | None:
    """A PNG of seed 0, None while nothing is served."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/generate",
        data=json.dumps({"seeds": [0]}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bytes(answer.read())
    except OSError:
        return None


def evaluate(out: Path) -> dict[str, object]:
    """Student and teacher by one call, on seeds that the choice of the weights has not seen."""
    command = [*CLI, "evaluate", str(out / "generator"), "--reference", "digits", "--teacher", str(out / "teacher"), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    scores: dict[str, object] = json.loads(done.stdout)
    return scores


if __name__ == "__main__":
    main()
