"""How fast the server answers: `python benchmarks/serving.py BUNDLE [--litserve FOLDER] [--ray] [--engine onnx]`.

Starts `uni-instruct serve` and, beside it, peers with the same engine and encoder (benchmarks/peers): BentoML's own batching,
a plain BentoML endpoint, LitServe where `pip install --target FOLDER litserve` has put it, and with --ray this app on Ray
Serve. All take turns, round by round, and answer one PNG per request to 1, 32 and 128 clients. Beside them noise, engine and
PNG without HTTP, in batches of 64, and the time that an idle server adds to a single one. Figures and ratios as JSON; ratios
are of medians over the rounds.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from http_load import closed_loop, now_and_then
from machine import describe_machine

PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(PEERS))
CLIENTS = (1, 32, 128)
PATIENCE_S = 120
IDLE_REQUESTS, IDLE_PAUSE_S = 200, 0.02
AWAKE_S = 0.2


@dataclass
class Target:
    """A server under test: how it is started, what is sent for a seed, and the path that tells when it is ready, if any."""

    name: str
    command: list[str]
    path: str
    body: str
    ready: str = ""
    port: int = 0
    latencies_ms: dict[int, list[float]] = field(default_factory=lambda: {clients: [] for clients in CLIENTS})
    images_per_s: dict[int, list[float]] = field(default_factory=lambda: {clients: [] for clients in CLIENTS})
    processes: list[psutil.Process] = field(default_factory=list)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Within the block it runs; before and after, its processes stand still: some servers poll while they are idle."""
        for process in self.processes:
            process.resume()
        time.sleep(AWAKE_S)
        try:
            yield
        finally:
            for process in self.processes:
                process.suspend()

    def load(self, clients: int, seconds: float) -> None:
        try:
            latencies, took = closed_loop(self.port, self.path, self.body, clients, seconds)
        except (AssertionError, OSError) as error:
            raise SystemExit(f"{self.name}, {clients} clients: {error}") from error
        self.latencies_ms[clients] += latencies
        self.images_per_s[clients].append(len(latencies) / took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--engine", default="", help="default: the fastest that was exported")
    parser.add_argument("--litserve", help="a folder that LitServe was installed into")
    parser.add_argument("--seconds", type=float, default=4.0, help="per server, number of clients and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="beside the same app on Ray Serve")
    options = parser.parse_args()
    os.environ["UNI_INSTRUCT_BUNDLE"] = str(Path(options.bundle).resolve()) if Path(options.bundle).exists() else options.bundle
    os.environ["UNI_INSTRUCT_ENGINE"] = options.engine
    targets = wanted_targets(options)
    with running(targets, options.litserve):
        from model import Model

        model = Model()
        bare, single = [bare_rate(model, options.seconds)], single_ms(model)
        with targets[0].turn():
            idle_ms = sorted(now_and_then(*place(targets[0]), IDLE_REQUESTS, IDLE_PAUSE_S))
        for _ in range(options.rounds):
            for clients in CLIENTS:
                for target in targets:
                    with target.turn():
                        target.load(clients, options.seconds)
            bare.append(bare_rate(model, options.seconds))
    # One PNG of a warm server at rest, and how much of it is not noise, engine and PNG.
    idle = {f"idle_p{round(100 * share)}_ms": quantile(idle_ms, share) for share in (0.5, 0.99)}
    idle |= {f"idle_added_p{round(100 * share)}_ms": round(quantile(idle_ms, share) - single, 2) for share in (0.5, 0.99)}
    print(json.dumps({**report(targets, statistics.median(bare)), **idle, **vars(options), **describe_machine()}, indent=2))


def wanted_targets(options: argparse.Namespace) -> list[Target]:
    """Ours first."""
    bento = [sys.executable, "-m", "bentoml", "serve", "--host", "127.0.0.1", "--port", "{port}"]
    engine = ["--engine", options.engine] if options.engine else []
    ours = [sys.executable, "-m", "uni_instruct", "serve", options.bundle, "--port", "{port}", *engine]
    targets = [
        Target("uni-instruct", ours, "/v1/generate", '{"seeds": [%d]}', ready="/readyz"),
        Target("BentoML batchable", [*bento, "batchable_service:Batchable"], "/generate", '{"seeds": [%d]}'),
        Target("BentoML plain", [*bento, "plain_service:Plain"], "/generate", '{"seed": %d}'),
    ]
    if options.litserve:
        command = [sys.executable, str(PEERS / "litserve_server.py"), "{port}"]
        targets.append(Target("LitServe", command, "/predict", '{"seed": %d}'))
        targets.append(Target("LitServe, fast queue", [*command, "fast"], "/predict", '{"seed": %d}'))
    if options.ray:
        command = [sys.executable, str(PEERS / "ray_serve_server.py"), "{port}"]
        targets.append(Target("on Ray Serve", command, targets[0].path, targets[0].body))
    return targets


def report(targets: Sequence[Target], bare: float) -> dict[str, object]:
    """Images per second, quantiles, and what ours has of the best peer's and of what is possible without HTTP."""
    ours, peers = targets[0], targets[1:]
    ratios: dict[str, float] = {}
    for clients in CLIENTS:
        rate = {target.name: statistics.median(target.images_per_s[clients]) for target in targets}
        p99 = {target.name: quantile(sorted(target.latencies_ms[clients]), 0.99) for target in targets}
        ratios[f"throughput_ratio_{clients}_clients"] = round(rate[ours.name] / max(rate[peer.name] for peer in peers), 2)
        ratios[f"p99_ratio_{clients}_clients"] = round(p99[ours.name] / min(p99[peer.name] for peer in peers), 2)
        ratios[f"share_of_bare_{clients}_clients"] = round(rate[ours.name] / bare, 2)
    return {**{target.name: summary(target) for target in targets}, "bare_images_per_s": round(bare, 1), **ratios}


def summary(target: Target) -> dict[str, object]:
    figures: dict[str, object] = {}
    for clients in CLIENTS:
        ordered = sorted(target.latencies_ms[clients])
        figures[f"{clients} clients"] = {
            "images_per_s": round(statistics.median(target.images_per_s[clients]), 1),
            "p50_ms": quantile(ordered, 0.5),
            "p99_ms": quantile(ordered, 0.99),
            "requests": len(ordered),
        }
    return figures


def quantile(ordered: Sequence[float], share: float) -> float:
    return round(ordered[int(share * len(ordered))], 2)


def bare_rate(model: "Model", seconds: float) -> float:  # type: ignore[name-defined]  # noqa: F821
    """Images per second of noise, engine and PNG in this thread."""
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        images += len(model.pngs(range(images, images + 64)))
    return images / (time.perf_counter() - start)


def single_ms(model: "Model") -> float:  # type: ignore[name-defined]  # noqa: F821
    """The median of single images, at the pace at which the idle server is asked."""
    taken = []
    for seed in range(IDLE_REQUESTS):
        time.sleep(IDLE_PAUSE_S)
        start = time.perf_counter()
        model.pngs([seed])
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken)


def place(target: Target) -> tuple[int, str, str]:
    return target.port, target.path, target.body


@contextlib.contextmanager
def running(targets: Sequence[Target], litserve: str | None) -> Iterator[None]:
    """All servers as processes, warm; stopped at the end."""
    paths = [os.environ.get("PYTHONPATH", ""), str(PEERS), *([litserve] if litserve else [])]
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
        for target in targets:
            target.port = free_port()
            environment = {
                **os.environ,
                "BENTOML_HOME": str(Path(home) / target.name.replace(" ", "")),
                "BENTOML_DO_NOT_TRACK": "true",
                "PYTHONPATH": os.pathsep.join(paths),
            }
            command = [part.replace("{port}", str(target.port)) for part in target.command]
            process = processes[target.name] = subprocess.Popen(command, cwd=PEERS, env=environment, stdout=sys.stderr)
            stack.callback(stop, target, process)
        for target in targets:
            until_ready(target)
            started = psutil.Process(processes[target.name].pid)
            target.processes = [started, *started.children(recursive=True)]
        for target in targets:
            with target.turn():
                pass
        yield


def stop(target: Target, process: "subprocess.Popen[bytes]") -> None:
    """Ends a server and all that it has started, some of which would not end by themselves."""
    for each in target.processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.resume()
    started = psutil.Process(process.pid)
    family = [*started.children(recursive=True), started]
    process.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(family, timeout=10)
    for each in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def until_ready(target: Target) -> None:
    address = f"http://127.0.0.1:{target.port}"
    json_type = {"Content-Type": "application/json"}
    until_answered(target, urllib.request.Request(address + target.path, (target.body % 7).encode(), json_type))
    if target.ready:  # it answers while it still loads other things
        until_answered(target, urllib.request.Request(address + target.ready))


def until_answered(target: Target, request: urllib.request.Request) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=10).close()
            return
        assert time.monotonic() < deadline, f"{target.name} does not answer"
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


if __name__ == "__main__":
    main()
