"""The server as a process: silent and slow connections, being stopped and being killed."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from builders.bad_requests import BadRequest, bad_requests
from builders.bundles import random_bundle
from builders.machine import run_cli
from builders.remedy_running import answering
from builders.servers import PATIENCE_S, Running, free_port, start
from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.errors import RequestError, UniInstructError
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.serve.load_test import Answer, TargetServer, count_wrong, summary
from uni_instruct.serve.metrics import use_private_folder
from uni_instruct.serve.process.supervision import CHECK_EVERY_S

CONNECTIONS = 20


@pytest.fixture(scope="module")
def bounded(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("bounded")
    (folder / "keys").write_text("sesame \nschlüssel\n", encoding="utf-8")
    options = ("--no-ui", "--connections", str(CONNECTIONS), "--receive-s", "2", "--api-key-file", str(folder / "keys"))
    running = start(exported_bundle, folder, *options, "--cors-origins", "https://page.example")
    try:
        running.until_announced()
        yield running
    finally:
        running.kill()


def connect(running: Running) -> socket.socket:
    port = int(running.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)


def test_silent_connections_lock_nobody_out(bounded: Running) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(bounded)) for _ in range(5 * CONNECTIONS)]
        answer = httpx.get(f"{bounded.url}/v1/models", headers={"Authorization": "Bearer sesame"}, timeout=PATIENCE_S)
        assert answer.status_code == 200
        # The first were closed to make room; the last are told when they have said nothing for too long.
        assert silent[0].recv(100) == b""
        assert silent[-1].recv(100).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"POST /v1/gen", b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"])
def test_a_request_that_drips_in_is_ended(bounded: Running, sent: bytes) -> None:
    with connect(bounded) as slow:
        slow.sendall(sent.replace(b"Host: x", b"Host: x\r\nAuthorization: Bearer sesame"))
        slow.settimeout(0.2)
        answer = b""
        for _ in range(100):  # a byte every now and then does not prolong it
            with contextlib.suppress(TimeoutError, BrokenPipeError):
                slow.sendall(b" ")
                answer = slow.recv(100)
            if answer:
                break
        assert answer.startswith(b"HTTP/1.1 408 ")
    metrics = httpx.get(f"{bounded.url}/metrics", headers={"Authorization": "Bearer sesame"}).text
    assert 'uni_instruct_requests_total{route="connection",status="408"}' in metrics


def test_where_few_files_may_be_open_silent_connections_still_lock_nobody_out(exported_bundle: Bundle, tmp_path: Path) -> None:
    port = free_port()
    serve = f"{sys.executable} -m uni_instruct serve {exported_bundle.path} --port {port} --no-ui"
    running = Running(["sh", "-c", f"ulimit -n 90; exec {serve}"], {}, port, tmp_path)
    try:
        running.until_announced()
        with contextlib.ExitStack() as stack:
            for _ in range(150):
                stack.enter_context(connect(running))
            assert httpx.get(f"{running.url}/v1/models", timeout=PATIENCE_S).status_code == 200
        assert "this process may open only 90 files" in running.log.read_text()
    finally:
        running.kill()


def test_bentomls_own_answers_carry_cors_headers_too(bounded: Running) -> None:
    for path in ("/generate", "/schema.json"):
        answer = httpx.post(f"{bounded.url}{path}", headers={"Origin": "https://page.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "https://page.example")


def test_a_load_test_checks_every_image(bounded: Running, exported_bundle: Bundle, tmp_path: Path) -> None:
    environment = {**os.environ, "UNI_INSTRUCT_API_KEY": "sesame"}
    load = ("loadtest", bounded.url, "--rate", "20", "--seconds", "1", "--images", "3", "--bundle")
    done = run_cli(*load, exported_bundle.path, "--json", env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["statuses"], report["images"], report["wrong_images"]) == ({"200": 20}, 60, 0)
    assert 0 < report["p50_ms"] <= report["p99_ms"]
    other = random_bundle(tmp_path / "other", seed=5)
    refused = run_cli(*load, other.path, env=environment)
    assert refused.returncode == 2
    assert "has other weights than tiny on the server; give --bundle FOLDER" in refused.stderr
    assert run_cli(*load, exported_bundle.path, env={**os.environ, "UNI_INSTRUCT_API_KEY": ""}).returncode == 2
    # The key where 'serve' has it, in any characters; and what does not ship is not looked for by a name from the network.
    (tmp_path / "keys").write_text("schlüssel\n", encoding="utf-8-sig")
    unknown = run_cli("loadtest", bounded.url, env={**os.environ, "UNI_INSTRUCT_API_KEY_FILE": str(tmp_path / "keys")})
    assert unknown.returncode == 2
    assert (
        "tiny is not a shipped generator, so there is nothing to compare its images with; give --bundle FOLDER"
        in unknown.stderr
    )


@pytest.mark.parametrize(
    "body", ["{}", '{"name": "digits"}', '[["name", "digits"]]', "[]", "7", "null", '{"name": "x", "engine": 1}', "<html>"]
)
def test_another_server_is_told_from_ours(body: str) -> None:
    with answering(200, body) as url, pytest.raises(RequestError, match="the server at this URL is not 'uni-instruct serve'"):
        TargetServer(url).facts(None)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999", "http://127.0.0.1:web", "http://[::1", "http://", "", "ftp://x", ".", "http://a..b"]
)
def test_what_is_no_address_is_said_to_be_none(url: str) -> None:
    with pytest.raises(RequestError, match=r"is not the URL of a server; give one, such as http://127\.0\.0\.1:3000"):
        TargetServer(url)


def test_a_wrong_pixel_a_wrong_seed_and_a_torn_file_are_counted(exported_bundle: Bundle) -> None:
    engine = open_engine(exported_bundle.path, "onnx")
    seeds = [4, 5]
    images = generate_images(engine, seeds, resolve_class_ids(engine.spec, seeds))

    def answer(pixels: np.ndarray, named: list[int]) -> Answer:
        file = io.BytesIO()
        np.savez(file, arr_0=pixels, seeds=np.array(named))
        return Answer(seeds, 200, 1.0, file.getvalue())

    altered = images.copy()
    altered[1, 0, 0, 0] ^= 128
    good, bad, swapped = answer(images, seeds), answer(altered, seeds), answer(images, [5, 4])
    torn = Answer(seeds, 200, 1.0, good.body[:100])
    lost = Answer(seeds, 0, 1.0, b"")
    assert [count_wrong([each], engine, 1) for each in (good, bad, swapped, torn, lost)] == [0, 1, 2, 2, 0]
    assert summary([good, bad, lost], 2.0)["statuses"] == {"200": 2, "no answer": 1}


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_bad_requests_end_in_no_5xx_no_hang_and_no_leak(bounded: Running, count: int) -> None:
    key = {"Authorization": "Bearer sesame"}
    worker = max(bounded.family(), key=lambda process: process.memory_info().rss)

    def files() -> int:
        held: int = worker.num_fds()
        return held

    def still_serving() -> None:
        httpx.post(f"{bounded.url}/v1/generate", json={}, headers=key, timeout=PATIENCE_S).raise_for_status()

    still_serving()
    before = files()
    for bad in bad_requests(count, seed=count, headers=key):
        answer = answer_to(bounded, bad)
        if not (bad.raw and not answer):  # what is not HTTP may be answered by closing
            assert answer.startswith(b"HTTP/1.1 "), (bad, answer)
            assert int(answer[9:12]) < 500, (bad, answer)
    still_serving()
    metrics = httpx.get(f"{bounded.url}/metrics", headers=key).text
    assert 'uni_instruct_queue_images{model="tiny"} 0.0' in metrics
    assert not re.search(r'uni_instruct_requests_total{[^}]*status="5', metrics)
    deadline = time.monotonic() + PATIENCE_S
    while files() > before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_clients_that_hang_up_have_asked_for_is_not_made(bounded: Running) -> None:
    key = {"Authorization": "Bearer sesame"}
    body = json.dumps({"seeds": list(range(256)), "format": "npz"})
    head = f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\nContent-Length: {len(body)}\r\n\r\n"

    def metric(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)", httpx.get(f"{bounded.url}/metrics", headers=key).text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    dropped = 'uni_instruct_dropped_images_total{model="tiny",reason="cancelled"}'
    before = metric(dropped)
    for _ in range(4):
        with connect(bounded) as connection:
            connection.sendall(f"{head}{body}".encode())
    deadline = time.monotonic() + PATIENCE_S
    while metric(dropped) == before or metric('uni_instruct_queue_images{model="tiny"}'):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answer_to(running: Running, bad: BadRequest) -> bytes:
    """All that comes until the server closes the connection, which may be before it has read all."""
    answer = b""
    with connect(running) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(bad.data)
            if bad.raw:
                connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(1 << 16):
                answer += part
    return answer


def test_the_command_that_is_killed_leaves_nothing_running(bounded: Running) -> None:
    import psutil

    family = bounded.family()
    assert len(family) >= 2
    os.kill(bounded.process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not alive


def test_stopped_under_load_it_finishes_what_runs_and_turns_the_rest_away(exported_bundle: Bundle, tmp_path: Path) -> None:
    """A request that the engine works on is answered with its images; who comes meanwhile gets 503, not a reset."""
    count = 4000
    running = start(
        exported_bundle,
        tmp_path,
        *(
            "--no-ui",
            "--max-batch",
            "1",
            "--request-images",
            str(count),
            "--queue-images",
            str(2 * count),
            "--grace-s",
            "90",
            "--timeout-s",
            "90",
        ),
    )
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = {"seeds": list(range(count)), "format": "npz"}
        answers.append(httpx.post(f"{running.url}/v1/generate", json=body, timeout=PATIENCE_S))

    try:
        running.until_announced()
        asking = threading.Thread(target=ask)
        # Every request on a new connection.
        with httpx.Client(base_url=running.url, limits=httpx.Limits(max_keepalive_connections=0), timeout=PATIENCE_S) as client:
            asking.start()
            while not re.search(r"^uni_instruct_queue_images{.*} [1-9]", client.get("/metrics").text, re.MULTILINE):
                assert asking.is_alive()
            running.process.send_signal(signal.SIGTERM)
            while (answer := client.post("/v1/generate", json={})).status_code == 200:
                assert asking.is_alive()
            for _ in range(5):
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
                assert answer.json()["error"]["message"].startswith("the server is stopping")
                answer = client.post("/v1/generate", json={})
            assert client.get("/livez").status_code == 200
        asking.join()
        assert answers[0].status_code == 200, answers[0].text
        engine = open_engine(exported_bundle.path, "onnx")
        seeds = [0, 1, count - 1]
        expected = generate_images(engine, seeds, resolve_class_ids(exported_bundle.spec, seeds))
        np.testing.assert_array_equal(np.load(io.BytesIO(answers[0].content))["arr_0"][seeds], expected)
        assert running.process.wait(PATIENCE_S) == 0
    finally:
        running.kill()


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(exported_bundle: Bundle, tmp_path: Path) -> None:
    running = start(exported_bundle, tmp_path, "--no-ui")
    try:
        running.until_announced()
        (worker,) = (process for process in running.family() if "_bentoml_impl.worker.service" in process.cmdline())
        worker.kill()
        worker.wait(PATIENCE_S)
        running.until_ready()
        answer = httpx.post(f"{running.url}/v1/generate", json={"seeds": [7], "format": "npz"}, timeout=PATIENCE_S)
        engine = open_engine(exported_bundle.path, "onnx")
        expected = generate_images(engine, [7], resolve_class_ids(engine.spec, [7]))
        np.testing.assert_array_equal(np.load(io.BytesIO(answer.content))["arr_0"], expected)
    finally:
        running.kill()


def test_metrics_have_a_folder_of_their_own_also_where_bentomls_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that is no other host's, whose name only begins the same."""
    home, elsewhere, host = tmp_path / "home", tmp_path / "elsewhere", socket.gethostname()
    for folder in (home, elsewhere):
        folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    others = [home / "uni-instruct-metrics" / name for name in (f"{host}-1-99999999-1", f"{host}-x", f"{host}-99999999-1")]
    for other in others:
        other.mkdir(parents=True)
    for shared, place in ((home, home), (Path("/proc/nowhere"), elsewhere)):
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(shared / "prometheus_multiproc_dir"))
        use_private_folder()
        assert Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).is_relative_to(place)
    assert [other.exists() for other in others] == [True, True, False]
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/proc/nowhere/prometheus_multiproc_dir")
    with pytest.raises(UniInstructError, match="the metrics of several workers cannot be stored: /proc/nowhere/"):
        use_private_folder()


def test_a_disk_that_gets_full_later_kills_no_worker(tmp_path: Path) -> None:
    """Counts are written into files mapped into memory, where a hole on a full disk is a SIGBUS. No file has any."""
    script = """
import os, pathlib
from uni_instruct.serve.metrics import ServerMetrics, use_private_folder
use_private_folder()
metrics = ServerMetrics()
metrics.of_model("digits").images.inc()
metrics.count_answer("/v1/generate", 200)
for file in pathlib.Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]).iterdir():
    print(file.stem.rpartition("_")[0], file.stat().st_size, 512 * file.stat().st_blocks)
"""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "home" / "prometheus_multiproc_dir")}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    files = {kind: (int(size), int(taken)) for kind, size, taken in map(str.split, ran.stdout.splitlines())}
    assert files.keys() == {"counter", "gauge_livesum", "histogram"}
    assert all(taken >= size >= 1 << 20 for size, taken in files.values())


@pytest.mark.parametrize(("command", "seconds"), [("import bentoml_cli.serve", CHECK_EVERY_S), ("pass", 10)])
def test_bentomls_supervisor_looks_for_dead_workers_every_second(command: str, seconds: float) -> None:
    """By itself it does every 10 s, and no setting changes that. The service is loaded before what makes the supervisor."""
    script = f"""
{command}
from uni_instruct.serve.process.supervision import check_workers_often
check_workers_often()
from bentoml._internal.utils.circus import create_standalone_arbiter
print(create_standalone_arbiter([]).check_delay)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(ran.stdout.split()[-1]) == seconds


def test_metrics_survive_a_killed_worker_and_another_server(exported_bundle: Bundle, tmp_path: Path) -> None:
    """The dead count no longer among the ready, and what a second server does to the folder of both is of no effect."""
    from bentoml.serving import ensure_prometheus_dir

    home = tmp_path / "home"
    running = start(exported_bundle, tmp_path, "--workers", "2", BENTOML_HOME=str(home))
    try:
        running.until_announced()
        with httpx.Client(base_url=running.url, timeout=PATIENCE_S) as client:

            def metric(name: str) -> float:
                return float(re.search(rf"^{re.escape(name)} (\S+)", client.get("/metrics").text, re.MULTILINE)[1])  # type: ignore[index]

            made = 'uni_instruct_images_total{model="tiny"}'
            for seed in range(10):
                assert client.post("/v1/generate", json={"seeds": [seed]}).status_code == 200
            assert (metric("uni_instruct_ready"), metric(made)) == (2, 10)
            (folder,) = (home / "uni-instruct-metrics").iterdir()
            worker = next(process for process in running.family() if any(folder.glob(f"gauge_livesum_{process.pid}.db")))
        worker.kill()
        with httpx.Client(base_url=running.url, timeout=PATIENCE_S, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            deadline = time.monotonic() + PATIENCE_S
            while metric("uni_instruct_ready") != 1:
                assert time.monotonic() < deadline
            # What every server does with this folder when it starts.
            (home / "prometheus_multiproc_dir" / "another").touch()
            ensure_prometheus_dir(directory=str(home / "prometheus_multiproc_dir"))
            assert metric(made) == 10
            while (ready := metric("uni_instruct_ready")) != 2:
                assert ready == 1
                assert time.monotonic() < deadline
    finally:
        running.kill()
