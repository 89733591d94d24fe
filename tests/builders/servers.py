"""Servers as processes."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from builders.paths import ROOT
from uni_instruct.bundle import Bundle

# No claim about speed: only that nothing waits for ever.
PATIENCE_S = 120.0


class Running:
    """A server process, its URL and what it printed."""

    def __init__(self, command: list[str], environment: dict[str, str], port: int, folder: Path, cwd: Path = ROOT):
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=cwd, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT
            )

    def until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_ready():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        return False

    def until_announced(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while "API " not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def family(self) -> list[Any]:
        import psutil

        children: list[Any] = psutil.Process(self.process.pid).children(recursive=True)
        return children

    def kill(self) -> None:
        if self.process.poll() is None:
            family = self.family()
            for process in (*family, self.process):
                with contextlib.suppress(Exception):
                    process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def start(bundle: Bundle | None, folder: Path, *options: str, **environment: str) -> Running:
    port = free_port()
    named = [str(bundle.path)] if bundle else []
    command = [sys.executable, "-m", "uni_instruct", "serve", *named, "--port", str(port), *options]
    return Running(command, environment, port, folder)
