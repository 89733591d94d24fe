"""How long a server takes to replace a worker that was killed: `python benchmarks/recovery.py BUNDLE --workers 2`.

Kills one (SIGKILL), again and again, while a client asks for an image ten times a second. Figures as JSON: the seconds until
every worker is ready again, and what became of the requests meanwhile. Linux only.
"""

import argparse
import contextlib
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator

import psutil
from machine import describe_machine
from serving import free_port

PATIENCE_S = 120
LOOK_S, ASK_S = 0.05, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    with running(options.bundle, options.workers) as (command, url), asking(url, outcomes):
        seconds = [killed(command, url, options.workers) for _ in range(options.kills)]
    figures = {"ready_again_s": seconds, "median_s": statistics.median(seconds), "requests": dict(outcomes)}
    print(json.dumps({**figures, **vars(options), **describe_machine()}, indent=2))


@contextlib.contextmanager
def running(bundle: str, workers: int) -> Iterator[tuple[psutil.Process, str]]:
    """The server, once every worker is ready; stopped at the end."""
    port = free_port()
    command = [sys.executable, "-m", "uni_instruct", "serve", bundle, "--port", str(port), "--workers", str(workers)]
    with tempfile.TemporaryDirectory() as home:
        process = psutil.Popen(command, env={**psutil.Process().environ(), "BENTOML_HOME": home}, stdout=sys.stderr)
        try:
            url = f"http://127.0.0.1:{port}"
            until_ready(url, workers)
            yield process, url
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)


@contextlib.contextmanager
def asking(url: str, outcomes: "Counter[str]") -> Iterator[None]:
    """Within the block a thread asks for an image now and then, and counts what comes of it."""
    over = threading.Event()

    def ask() -> None:
        while not over.wait(ASK_S):
            outcomes[answer(url)] += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def answer(url: str) -> str:
    """The HTTP status of one image, or the error's name where there was none."""
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/generate", b"{}"), timeout=PATIENCE_S) as response:
            return str(response.status)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except OSError as error:
        return type(error).__name__


def killed(command: psutil.Process, url: str, workers: int) -> float:
    """Seconds from the death of a worker until every worker is ready."""
    found = [process for process in command.children(recursive=True) if "_bentoml_impl.worker.service" in process.cmdline()]
    found[0].kill()
    start = time.monotonic()
    found[0].wait(PATIENCE_S)
    until_ready(url, workers)
    return round(time.monotonic() - start, 2)


def until_ready(url: str, workers: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while ready_workers(url) < workers:
        assert time.monotonic() < deadline, "the workers do not become ready"
        time.sleep(LOOK_S)


def ready_workers(url: str) -> float:
    """By the sum of their metrics, from which the dead are taken out."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
        found = re.search(r"^uni_instruct_ready (\S+)", response.read().decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0
    return 0.0


if __name__ == "__main__":
    main()
