"""What a newcomer gets from one command: a generator about as good as its teacher, served, and gone after Ctrl-C."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from builders.machine import run_cli
from builders.runs import start_cli, wait_for_step
from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.images import encode

PORT = 3931


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickstart_ends_serving_a_generator_as_good_as_promised(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    command = [sys.executable, "-m", "uni_instruct", "quickstart", "--out", str(out), "--port", str(PORT)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_until_serving(process)
        served = fetch_png(seed=5)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    finally:
        process.send_signal(signal.SIGINT)
    process.wait(30)
    assert not psutil.wait_procs(family, timeout=5)[1], "processes are left"

    engine = open_engine(Bundle.open(out / "generator"), "onnx")
    assert served == encode(generate_images(engine, [5], resolve_class_ids(engine.spec, [5]))[0])
    scores = run_cli("evaluate", out / "generator", "--reference", "digits", "--teacher", out / "teacher", "--json")
    assert scores.returncode == 0, scores.stderr
    answer = json.loads(scores.stdout)
    assert answer["distance_to_teacher_ratio"] <= 1.5, answer
    assert answer["scores"]["generator"]["values"]["class_accuracy"] >= 0.95, answer
    again = run_cli("quickstart", "--out", out, "--no-serve")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_quickstart_interrupted_while_it_trains_keeps_what_is_trained_and_leaves_no_process(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    process = start_cli("quickstart", "--out", str(out), "--no-serve")
    wait_for_step(out, "teacher", step=7, process=process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not psutil.wait_procs(family, timeout=5)[1], "processes are left"
    assert (out / "state" / "teacher.pt").exists()


def wait_until_serving(process: subprocess.Popen[str]) -> None:
    """Reads what the process prints until it says so."""
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith(f"serving on http://127.0.0.1:{PORT}"):
            return
    pytest.fail("".join(printed))


def fetch_png(seed: int) -> bytes:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/generate",
        data=json.dumps({"seeds": [seed]}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return bytes(answer.read())


def test_quickstart_names_a_taken_port_before_it_trains(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_cli("quickstart", "--out", tmp_path / "out", "--port", str(port))
    assert (done.returncode, done.stderr) == (2, f"error: port {port} is already in use; choose another --port\n")
    assert not (tmp_path / "out").exists()
