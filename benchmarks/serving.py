"""How fast the server answers: `python benchmarks/serving.py BUNDLE [--engine onnx] [--seconds 5] [--rounds 3] [--ray]`.

Starts `uni-instruct serve` and, beside it, a plain BentoML endpoint that makes one engine call per request, or with --ray
the same app as one replica on Ray Serve that may use all cores. Both are asked for one PNG per request: the first answer of
the warm server, latency with 1 client, latency and throughput with 32. The two take turns, round by round, on the same
machine; the ratio is of medians over the rounds.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from machine import describe_machine

HERE = Path(__file__).parent
CLIENTS = (1, 32)


@dataclass
class Target:
    """A server under test: where it listens, and what is sent for a seed."""

    name: str
    port: int
    path: str
    body: str
    first_ms: float = 0.0
    latencies_ms: dict[int, list[float]] = field(default_factory=lambda: {clients: [] for clients in CLIENTS})
    images_per_s: dict[int, list[float]] = field(default_factory=lambda: {clients: [] for clients in CLIENTS})

    def request(self, seed: int) -> bytes:
        body = self.body % seed
        head = f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--engine", default="", help="default: the fastest that was exported")
    parser.add_argument("--seconds", type=float, default=5.0, help="per server, number of clients and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="beside the same app on Ray Serve")
    options = parser.parse_args()
    ours = Target("uni-instruct", free_port(), "/v1/generate", '{"seeds": [%d]}')
    plain = Target("plain BentoML", free_port(), "/generate", '{"seed": %d}')
    if options.ray:
        plain = Target("on Ray Serve", free_port(), ours.path, ours.body)
    with running(ours, plain, options.bundle, options.engine, options.ray):
        for target in (ours, plain):
            asyncio.run(until_ready(target))
            target.first_ms = asyncio.run(measure(target, clients=1, seconds=0))[0]
        for _ in range(options.rounds):
            for clients in CLIENTS:
                for target in (ours, plain):
                    start = time.perf_counter()
                    latencies = asyncio.run(measure(target, clients, options.seconds))
                    target.images_per_s[clients].append(len(latencies) / (time.perf_counter() - start))
                    target.latencies_ms[clients] += latencies
    print(json.dumps(report(ours, plain, options), indent=2))


def report(ours: Target, plain: Target, options: argparse.Namespace) -> dict[str, object]:
    """Milliseconds, images per second, and how many times the other's throughput ours has."""
    ratio = {
        f"throughput_ratio_{clients}_clients": round(
            statistics.median(ours.images_per_s[clients]) / statistics.median(plain.images_per_s[clients]), 2
        )
        for clients in CLIENTS
    }
    return {**{target.name: summary(target) for target in (ours, plain)}, **ratio, **vars(options), **describe_machine()}


def summary(target: Target) -> dict[str, object]:
    figures: dict[str, object] = {"first_png_ms": round(target.first_ms, 2)}
    for clients in CLIENTS:
        ordered = sorted(target.latencies_ms[clients])
        figures[f"{clients} clients"] = {
            "p50_ms": round(ordered[len(ordered) // 2], 2),
            "p99_ms": round(ordered[int(0.99 * len(ordered))], 2),
            "images_per_s": round(statistics.median(target.images_per_s[clients]), 1),
            "requests": len(ordered),
        }
    return figures


async def measure(target: Target, clients: int, seconds: float) -> list[float]:
    """Latencies in ms of clients that ask, wait and ask again until the time is up; at least one request each."""
    end = time.perf_counter() + seconds
    latencies = await asyncio.gather(*(client(target, end) for _ in range(clients)))
    return [latency for of_one in latencies for latency in of_one]


async def client(target: Target, end: float) -> list[float]:
    latencies = []
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    while True:
        writer.write(target.request(random.getrandbits(31)))
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("content-length:"))
        body = await reader.readexactly(length)
        assert head.startswith("http/1.1 200"), head + body.decode(errors="replace")
        assert body.startswith(b"\x89PNG"), body[:100]
        now = time.perf_counter()
        latencies.append(1e3 * (now - start))
        if now >= end:
            break
        start = now
    writer.close()
    return latencies


async def until_ready(target: Target) -> None:
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            answer = await reader.read()
            writer.close()
            if answer.startswith(b"HTTP/1.1 200"):
                return
        await asyncio.sleep(0.2)


@contextlib.contextmanager
def running(ours: Target, plain: Target, bundle: str, engine: str, ray: bool) -> Iterator[None]:
    """Both servers as processes, stopped at the end."""
    command = [sys.executable, "-m", "uni_instruct", "serve", bundle, "--port", str(ours.port)]
    serve = ["serve", "plain_service:Plain", "--host", "127.0.0.1", "--port", str(plain.port)]
    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "BENTOML_HOME": home,
            "BENTOML_DO_NOT_TRACK": "true",
            "UNI_INSTRUCT_BUNDLE": str(Path(bundle).resolve()) if Path(bundle).exists() else bundle,
            "UNI_INSTRUCT_ENGINE": engine,
        }
        beside, folder = [sys.executable, "-m", "bentoml", *serve], str(HERE)
        if ray:
            beside, folder = on_ray(Path(home), plain.port, environment["UNI_INSTRUCT_BUNDLE"], engine), home
        servers = [
            subprocess.Popen([*command, *(["--engine", engine] if engine else [])], stdout=sys.stderr),
            subprocess.Popen(beside, cwd=folder, env=environment, stdout=subprocess.DEVNULL),
        ]
        try:
            yield
        finally:
            for server in servers:
                server.send_signal(signal.SIGTERM)
            for server in servers:
                server.wait()


def on_ray(folder: Path, port: int, bundle: str, engine: str) -> list[str]:
    """The command that serves the bundle on a Ray of this machine, with a configuration in the folder."""
    arguments = {"bundle": bundle, "cpus": str(os.cpu_count() or 1), **({"engine": engine} if engine else {})}
    application = {"name": "images", "import_path": "uni_instruct.serve.ray_serve:build", "args": arguments}
    config = folder / "serve.yaml"
    # JSON is YAML.
    config.write_text(json.dumps({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}))
    return [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


if __name__ == "__main__":
    main()
