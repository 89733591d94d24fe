"""Overload and broken clients: `python benchmarks/soak.py [--bundle digits] [--minutes 30]`, or `make soak MINUTES=30`. Linux.

A server of its own is asked for twice as many images as it can make, by clients of whom some hang up, some send garbage and
some open the demo's page. Every image is held against the one made here from its seed. Exit code 1, with the promises that were
broken, where an image is wrong, an answer is a 5xx, a request gets none, memory grows, or a refusal or /livez takes too long.
"""

import argparse
import asyncio
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path

import numpy as np
import psutil
from machine import describe_machine
from soak_client import Lag, Reply, Wire, waited_for_cpu_ms

from uni_instruct.engine import open_engine
from uni_instruct.generate import generate_images, resolve_class_ids

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from builders.bad_requests import bad_requests

# Of one request: a client in Python that asked for single images would need more of the machine than the server.
IMAGES = 16
# Seeds that are asked for; their images are made once, before the load.
SEEDS = 4096
OVERLOAD = 2.0
# Of the requests: so many hang up while they wait. Beside them, a second: broken requests, and opened pages.
HANG_UP, BROKEN_PER_S, PAGES_PER_S = 0.05, 20, 0.5
PROBE_EVERY_S, LOOKS_A_MINUTE, PATIENCE_S = 0.05, 12, 60.0
# What is promised.
REFUSED_WITHIN_MS, STALL_MS, GROWTH = 50.0, 50.0, 0.05


class Soak:
    """What is asked, and what came of it."""

    def __init__(self, port: int, expected: np.ndarray):
        self.port, self.expected = port, expected
        self.worker, self.threads = 0, list[int]()  # the server's worker process, and those of its threads that work
        self.statuses: Counter[str] = Counter()
        self.wrong = self.images = 0
        self.refusals_ms: list[float] = []
        self.refusals_wall_ms: list[float] = []  # with what is not the server's
        self.latencies_ms: list[float] = []
        self.stalls_ms: list[float] = []
        self.memory_mb: list[float] = []
        self.unexplained: list[str] = []
        self.lag = Lag()

    async def ask(self, wire: Wire) -> None:
        """One request for IMAGES images, which some clients do not wait for."""
        seeds = [random.randrange(SEEDS) for _ in range(IMAGES)]
        body = json.dumps({"seeds": seeds, "format": "npz"}).encode()
        if random.random() < HANG_UP:
            await wire.hang_up(body, after_s=random.uniform(0, 0.2))
            self.statuses["hung up"] += 1
            return
        reply, took_ms = await self._timed(wire.post("/v1/generate", body))
        self._note("", reply)
        if reply.status == 200:
            self.images += IMAGES
            self.latencies_ms.append(reply.took_ms)
            self.wrong += self._wrong(seeds, reply.body)
        elif reply.status == 429:
            self.refusals_ms.append(took_ms)
            self.refusals_wall_ms.append(reply.took_ms)

    async def probe(self) -> None:
        """/livez, again and again: how long it takes is how long the event loop was held up."""
        async with Wire(self.port) as wire:
            while True:
                reply, took_ms = await self._timed(wire.get("/livez"))
                self.stalls_ms.append(took_ms)
                self._note("livez ", reply)
                await asyncio.sleep(PROBE_EVERY_S)

    async def break_things(self) -> None:
        """Broken requests, each on a connection of its own."""
        number = 0
        while True:
            for bad in bad_requests(2000, seed=number):
                reply = await Wire(self.port).raw(bad.data, half_close=bad.raw)
                if reply.status >= 500 or (reply.status == 0 and not bad.raw):
                    self.unexplained.append(f"{bad.kind} {bad.data[:200]!r}: {reply.body[:200]!r}")
                self._note("broken ", reply, judge=False)
                await asyncio.sleep(1 / BROKEN_PER_S)
            number += 1

    async def open_pages(self) -> None:
        """The demo's page, its scripts, and a heartbeat as an open page holds it."""
        while True:
            async with Wire(self.port) as wire:
                for path in ("/ui", "/v1/about", "/v1/models"):
                    self._note("page ", await wire.get(path))
            await Wire(self.port).raw(b"GET /ui/gradio_api/heartbeat/soak HTTP/1.1\r\nHost: x\r\n\r\n", leave_after_s=1.0)
            await asyncio.sleep(1 / PAGES_PER_S)

    async def watch_memory(self, worker: psutil.Process) -> None:
        """Resident megabytes of the worker, with a line a minute."""
        while True:
            self.memory_mb.append(worker.memory_info().rss / 2**20)
            minute, between = divmod(len(self.memory_mb) - 1, LOOKS_A_MINUTE)
            if not between:
                print(f"minute {minute}: {self.memory_mb[-1]:.1f} MB", file=sys.stderr)
            await asyncio.sleep(60 / LOOKS_A_MINUTE)

    async def _timed(self, asking: Awaitable[Reply]) -> tuple[Reply, float]:
        """The reply, and the milliseconds that it took the server.

        Not its own are those that this process was late by, and those in which the server's threads were ready to run and
        other processes had the processors.
        """
        waited_ms = waited_for_cpu_ms(self.worker, self.threads)
        reply = await asking
        others_ms = waited_for_cpu_ms(self.worker, self.threads) - waited_ms
        return reply, max(0.0, reply.took_ms - others_ms - self.lag.worst_ms(reply.start, reply.end))

    def _note(self, what: str, reply: Reply, judge: bool = True) -> None:
        self.statuses[f"{what}{reply.status or 'no answer'}"] += 1
        if judge and (reply.status == 0 or reply.status >= 500):
            self.unexplained.append(f"{what}{reply.status or 'no answer'}: {reply.body[:200]!r}")

    def _wrong(self, seeds: list[int], body: bytes) -> int:
        try:
            with np.load(io.BytesIO(body)) as arrays:
                images, named = arrays["arr_0"], arrays["seeds"].tolist()
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
            return len(seeds)
        expected = self.expected[seeds]
        if named != seeds or images.shape != expected.shape:
            return len(seeds)
        return int((images != expected).reshape(len(seeds), -1).any(axis=1).sum())

    def broken(self) -> list[str]:
        """The promises that were not kept."""
        late = [ms for ms in self.refusals_ms if ms > REFUSED_WITHIN_MS]
        stalled = [ms for ms in self.stalls_ms if ms > STALL_MS]
        growth = growth_of(self.memory_mb)
        return [
            *([f"{self.wrong} images are wrong"] if self.wrong else []),
            *([f"{len(self.unexplained)} answers cannot be explained: {self.unexplained[:5]}"] if self.unexplained else []),
            *([f"{len(late)} refusals took over {REFUSED_WITHIN_MS:g} ms, at most {max(late):.0f}"] if late else []),
            *([f"/livez took over {STALL_MS:g} ms {len(stalled)} times, at most {max(stalled):.0f}"] if stalled else []),
            *([f"memory has grown by {growth:.1%}"] if growth > GROWTH else []),
            *(["nothing was refused: this was no overload"] if not self.refusals_ms else []),
        ]

    def report(self) -> dict[str, object]:
        """What happened, for JSON."""
        return {
            "statuses": dict(sorted(self.statuses.items())),
            "images": self.images,
            "wrong_images": self.wrong,
            "latency_ms": quantiles(self.latencies_ms),
            "refusal_ms": quantiles(self.refusals_ms),
            "refusal_wall_ms": quantiles(self.refusals_wall_ms),
            "livez_ms": quantiles(self.stalls_ms),
            "own_lag_ms": quantiles(self.lag.all_ms),
            "memory_mb_by_minute": [round(megabytes, 1) for megabytes in self.memory_mb[::LOOKS_A_MINUTE]],
            "memory_growth": round(growth_of(self.memory_mb), 4),
            "memory_mb_a_minute_in_second_half": round(slope_of(self.memory_mb[len(self.memory_mb) // 2 :]), 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="digits")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--out", type=Path, help="the report as JSON")
    options = parser.parse_args()
    engine = open_engine(options.bundle)
    seeds = list(range(SEEDS))
    expected = generate_images(engine, seeds, resolve_class_ids(engine.spec, seeds))
    with tempfile.TemporaryDirectory() as folder, socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = int(trial.getsockname()[1])
        trial.close()
        command = [
            sys.executable,
            "-m",
            "uni_instruct",
            "serve",
            options.bundle,
            "--port",
            str(port),
            "--engine",
            str(engine.id),
        ]
        with (Path(folder) / "log.txt").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "BENTOML_HOME": folder})
        try:
            soak = Soak(port, expected)
            asyncio.run(run(soak, server, options.minutes))
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(PATIENCE_S)
    broken = soak.broken() + ([f"stopping ended with exit code {status}"] if status else [])
    report = {**soak.report(), "broken": broken, "minutes": options.minutes, "bundle": options.bundle, **describe_machine()}
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    sys.exit(1 if broken else 0)


async def run(soak: Soak, server: "subprocess.Popen[bytes]", minutes: float) -> None:
    """Measures the capacity, then asks for OVERLOAD times as much for so many minutes."""
    await until_ready(soak.port, server)
    worker = max(psutil.Process(server.pid).children(recursive=True), key=lambda child: child.memory_info().rss)
    capacity = await closed_loop(soak, clients=8, seconds=5.0)
    threads = {thread.id: thread.user_time + thread.system_time for thread in worker.threads()}
    soak.worker, soak.threads = worker.pid, [thread for thread, used in threads.items() if used > 0.02 * max(threads.values())]
    print(f"{capacity:.0f} images a second with 8 clients; asking for {OVERLOAD:g} times as many", file=sys.stderr)
    beside = [soak.lag.measure(), soak.probe(), soak.break_things(), soak.open_pages(), soak.watch_memory(worker)]
    tasks = [asyncio.create_task(each) for each in beside]
    await open_loop(soak, capacity * OVERLOAD / IMAGES, 60 * minutes)
    for task in tasks:
        if task.done():
            task.result()
        task.cancel()
    async with Wire(soak.port) as wire:
        waiting = queued((await wire.get("/metrics")).body)
        if waiting:
            soak.unexplained.append(f"{waiting:g} images are still queued when nobody waits")


async def closed_loop(soak: Soak, clients: int, seconds: float) -> float:
    """Images a second with so many clients that wait for their answers."""
    end = time.perf_counter() + seconds

    async def client() -> None:
        async with Wire(soak.port) as wire:
            while time.perf_counter() < end:
                await soak.ask(wire)

    await asyncio.gather(*(client() for _ in range(clients)))
    return soak.images / seconds


async def open_loop(soak: Soak, rate: float, seconds: float) -> None:
    """Requests at a steady rate, whether earlier ones are answered or not, on connections that are kept."""
    free: list[Wire] = []
    asking: set[asyncio.Task[None]] = set()

    async def one(wire: Wire) -> None:
        await soak.ask(wire)
        free.append(wire)

    start = time.perf_counter()
    for number in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        task = asyncio.create_task(one(free.pop() if free else Wire(soak.port)))
        asking.add(task)
        task.add_done_callback(asking.discard)
    if asking:
        await asyncio.wait(asking, timeout=PATIENCE_S)
    soak.unexplained += ["a request was never answered"] * len(asking)
    for wire in free:
        wire.close()


async def until_ready(port: int, server: "subprocess.Popen[bytes]") -> None:
    while True:
        assert server.poll() is None, "the server has ended"
        if (await Wire(port).raw(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).status == 200:
            return
        await asyncio.sleep(0.2)


def queued(metrics: bytes) -> float:
    """Images in the queue, by the server's own count."""
    lines = metrics.decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("uni_instruct_queue_images{"))


def growth_of(memory_mb: list[float]) -> float:
    """The last tenth against the one after the first third, in which pools and caches are still being filled."""
    third, tenth = len(memory_mb) // 3, len(memory_mb) // 10
    if not tenth:
        return 0.0
    return float(np.mean(memory_mb[-tenth:]) / np.mean(memory_mb[third : third + tenth])) - 1


def slope_of(memory_mb: list[float]) -> float:
    """Megabytes a minute: the line of least squares through all looks. Near 0 where memory does not go on growing."""
    if len(memory_mb) < 2:
        return 0.0
    minutes = np.arange(len(memory_mb)) / LOOKS_A_MINUTE
    return float(np.polyfit(minutes, memory_mb, deg=1)[0])


def quantiles(values: list[float]) -> dict[str, float]:
    return {f"p{q:g}": round(float(np.percentile(values, q)), 2) for q in (50, 99, 99.9, 100)} if values else {}


if __name__ == "__main__":
    main()
