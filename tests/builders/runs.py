"""Runs: started as a user starts them, followed, and what they write."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest


def start_cli(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "uni_instruct", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def wait_for_step(out: Path, stage: str, step: int, process: subprocess.Popen[str]) -> None:
    """Until the log says that the stage is past that step."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        records = [json.loads(line) for line in read_lines(out / "log.jsonl")]
        if any(record["stage"] == stage and record["step"] >= step for record in records):
            return
        time.sleep(0.02)
    pytest.fail(f"{stage} did not reach step {step}")


def read_lines(path: Path) -> list[str]:
    """Whole lines only: the last may be half written."""
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


WITHOUT_DATA = ("data=", "divergence=reverse-kl", "loop.metric=none", "critic_updates=1")


def run_at(folder: Path, **steps: int) -> Path:
    """What is on disk of a run whose stages stand at these steps."""
    (folder / "state").mkdir(parents=True)
    for stage, step in steps.items():
        (folder / "state" / f"{stage}.pt").touch()
        (folder / "state" / f"{stage}.json").write_text(json.dumps({"step": step}))
    return folder
