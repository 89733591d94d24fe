"""The real server as a process: over HTTP, in a browser, through BentoML, and how it stops."""

import functools
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from builders.bundles import random_bundle
from builders.machine import run_cli
from builders.paths import ROOT
from builders.servers import PATIENCE_S, Running, free_port, start
from uni_instruct.bundle import Bundle, default_generator, shipped_generators
from uni_instruct.engine import Engine, open_engine
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.serve.model_sources import default_sources

KEY = "sesame"
# The server stops within 5 s of its own accord; an open page would hold BentoML for over 20.
STOPS_WITHIN_S = 10.0

BLOCK_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Block())
"""


@pytest.fixture(scope="module")
def server(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`uni-instruct serve` with the demo, in a Python that has no torch."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "sitecustomize.py").write_text(BLOCK_TORCH)
    running = start(exported_bundle, folder, PYTHONPATH=str(folder))
    try:
        running.until_announced()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def bento(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`bentoml serve .` from the checkout, with an API key."""
    folder, port = tmp_path_factory.mktemp("bento"), free_port()
    environment = {
        "BENTOML_HOME": str(folder / "home"),
        "BENTOML_DO_NOT_TRACK": "true",
        "UNI_INSTRUCT_BUNDLE": str(exported_bundle.path),
        "UNI_INSTRUCT_API_KEY": KEY,
        "UNI_INSTRUCT_UI": "false",
        "UNI_INSTRUCT_MAX_BODY_BYTES": "2000",
    }
    command = [sys.executable, "-m", "bentoml", "serve", ".", "--host", "127.0.0.1", "--port", str(port)]
    running = Running(command, environment, port, folder)
    try:
        running.until_ready()
        yield running
    finally:
        running.kill()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@functools.cache
def onnx_engine(path: Path) -> Engine:
    return open_engine(path, "onnx")


def truth(bundle: Bundle, seeds: list[int], classes: list[int | str] | None = None) -> np.ndarray:
    """What `generate` makes of the seeds on the engine that is served: uint8 [N, H, W]."""
    engine = onnx_engine(bundle.path)
    return generate_images(engine, seeds, resolve_class_ids(bundle.spec, seeds, classes))[:, :, :, 0]


def test_without_torch_it_serves_what_generate_makes(server: Running, exported_bundle: Bundle) -> None:
    answer = httpx.post(f"{server.url}/v1/generate", json={"seeds": [7]})
    assert answer.status_code == 200
    assert answer.headers["x-engine"] == "onnx-fp32"
    np.testing.assert_array_equal(pixels(answer.content), truth(exported_bundle, [7])[0])


def test_32_clients_get_their_own_images(server: Running, exported_bundle: Bundle) -> None:
    requests = [list(range(100 * n, 100 * n + 1 + n % 5)) for n in range(64)]

    def fetch(seeds: list[int]) -> np.ndarray:
        body = {"seeds": seeds, "classes": ["3"], "format": "npz"}
        answer = client.post("/v1/generate", json=body)
        images: np.ndarray = np.load(io.BytesIO(answer.content))["arr_0"]
        return images[:, :, :, 0]

    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client, ThreadPoolExecutor(32) as pool:
        for seeds, images in zip(requests, pool.map(fetch, requests), strict=True):
            np.testing.assert_array_equal(images, truth(exported_bundle, seeds, ["3"]))


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/generate", b'{"seeds": [-1]}', 400),
        ("POST", "/v1/generate", b'{"num_images": 0}', 400),
        ("POST", "/v1/generate", b'{"num_images": 1000000}', 400),
        ("POST", "/v1/generate", b'{"classes": ["dog"]}', 400),
        ("POST", "/v1/generate", b"{", 400),
        ("POST", "/v1/generate", b"\x89PNG\r\n\x1a\n", 400),
        ("POST", "/v1/generate", b" " * 2_000_000, 413),
        ("GET", "/v1/generate", b"", 405),
        ("GET", "/v1/nothing", b"", 404),
    ],
)
def test_errors_have_one_shape(server: Running, method: str, path: str, content: bytes, status: int) -> None:
    answer = httpx.request(method, f"{server.url}{path}", content=content)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code", "remedy"}
    assert httpx.post(f"{server.url}/v1/generate", json={}).status_code == 200  # and the server goes on


def test_the_pages_need_nothing_from_elsewhere(server: Running) -> None:
    for path in ("/", "/docs"):
        page = httpx.get(f"{server.url}{path}").text
        assert "https://" not in page
    assert httpx.get(f"{server.url}/static_content/swagger-ui-bundle.js").status_code == 200
    assert 'data-ui="on"' in httpx.get(f"{server.url}/").text


def test_bentoml_serves_the_checkout(bento: Running, exported_bundle: Bundle) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{bento.url}/v1/generate", json={"seeds": [7]}, headers=headers)
    np.testing.assert_array_equal(pixels(answer.content), truth(exported_bundle, [7])[0])
    assert httpx.get(f"{bento.url}/ui", headers=headers).status_code == 404
    for path in ("/livez", "/readyz", "/healthz"):
        assert httpx.get(f"{bento.url}{path}").status_code == 200
    assert "uni_instruct_ready 1.0" in httpx.get(f"{bento.url}/metrics", headers=headers).text


def test_bentomls_own_routes_are_guarded_too(bento: Running) -> None:
    for method, path in (("POST", "/generate"), ("GET", "/schema.json"), ("POST", "/v1/generate"), ("GET", "/metrics")):
        assert httpx.request(method, f"{bento.url}{path}").status_code == 401
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    assert httpx.post(f"{bento.url}/generate", content=b" " * 2001, headers=headers).status_code == 413


def test_bentomls_client_gets_arrays(bento: Running, exported_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENTOML_DO_NOT_TRACK", "true")
    import bentoml

    with bentoml.SyncHTTPClient(bento.url, token=KEY) as client:
        images = np.asarray(client.generate(seeds=[7, 8], classes=["3"]))
        np.testing.assert_array_equal(images[:, :, :, 0], truth(exported_bundle, [7, 8], ["3"]))
        with pytest.raises(bentoml.exceptions.BentoMLException, match="class dog is neither a class name nor an id"):
            client.generate(classes=["dog"])
        with pytest.raises(bentoml.exceptions.NotFound, match="no model 'red' is served; choose one of tiny"):
            client.generate(model="red")


@pytest.mark.parametrize(
    ("body", "content_type", "status", "message"),
    [
        (b'{"seeds": ["a"]}', "application/json", 400, "seeds[0] is 'a'; give a list of integers"),
        (b'{"seeds": [1.0]}', "application/json", 400, "seeds[0] is 1.0"),
        (b'{"seds": [1]}', "application/json", 400, "field 'seds' is unknown; the fields are seeds, num_images,"),
        (b'{"seeds": [1], "num_images": 1}', "application/json", 400, "both seeds and num_images are given"),
        (b'{"model": "red"}', "application/json", 404, "no model 'red' is served"),
        (b"{", "application/json", 400, "the body is not JSON"),
        (b"seeds=1", "application/x-www-form-urlencoded", 415, "is not supported; send application/json"),
    ],
)
def test_bentomls_own_route_is_as_strict_as_the_others(
    bento: Running, body: bytes, content_type: str, status: int, message: str
) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": content_type, "X-Request-ID": "mine"}

    def counted() -> float:
        metrics = httpx.get(f"{bento.url}/metrics", headers=headers).text
        start = f'uni_instruct_requests_total{{route="/generate",status="{status}"}} '
        return sum(float(line.removeprefix(start)) for line in metrics.splitlines() if line.startswith(start))

    before = counted()
    answer = httpx.post(f"{bento.url}/generate", content=body, headers=headers)
    assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine")
    assert set(answer.json()["error"]) == {"message", "type", "param", "code", "remedy"}
    assert message in answer.json()["error"]["message"]
    assert counted() == before + 1
    assert "Traceback" not in bento.log.read_text()


def test_bentomls_own_route_reads_what_the_others_read(bento: Running, exported_bundle: Bundle) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = b'\xef\xbb\xbf{"seeds": ["7"], "classes": ["3"]}'
    answer = httpx.post(f"{bento.url}/generate", content=body, headers=headers)
    assert answer.status_code == 200
    np.testing.assert_array_equal(np.array(answer.json())[:, :, :, 0], truth(exported_bundle, [7], ["3"]))


def test_bentoml_builds_the_checkout(tmp_path: Path) -> None:
    environment = {**os.environ, "BENTOML_HOME": str(tmp_path), "BENTOML_DO_NOT_TRACK": "true"}
    command = [sys.executable, "-m", "bentoml", "build", "--output", "tag"]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    name, version = built.stdout.strip().split(":")[-2:]
    folder = tmp_path / "bentos" / name / version
    for path in ("bento.yaml", "src/pyproject.toml", "src/serve/service.py", "src/serve/pages/demo.css"):
        assert (folder / path).is_file()
    assert (folder / "src/uni_instruct/bundle.py").read_bytes() == (ROOT / "uni_instruct/bundle.py").read_bytes()
    assert "uv pip install -e './src[serve]'" in (folder / "env/docker/Dockerfile").read_text()


def gone(process: Any) -> bool:
    import psutil

    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_ctrl_c_stops_it_also_with_an_open_page(exported_bundle: Bundle, tmp_path: Path) -> None:
    running = start(exported_bundle, tmp_path)
    try:
        running.until_announced()
        family = running.family()
        assert len(family) >= 2  # BentoML's supervisor and its worker
        page = f"{running.url}/ui/gradio_api/heartbeat/open"
        with httpx.stream("GET", page, timeout=PATIENCE_S) as heartbeat:
            assert heartbeat.status_code == 200
            running.process.send_signal(signal.SIGINT)
            assert running.process.wait(STOPS_WITHIN_S) == 0
        assert all(map(gone, family))
        assert "stopping" in running.log.read_text()
    finally:
        running.kill()


@pytest.mark.parametrize("moment", ["starting", "serving"])
def test_a_polite_kill_leaves_no_orphans(exported_bundle: Bundle, tmp_path: Path, moment: str) -> None:
    running = start(exported_bundle, tmp_path, UNI_INSTRUCT_UI="false")
    try:
        if moment == "serving":
            running.until_announced()
        deadline = time.monotonic() + PATIENCE_S
        while not running.family() and time.monotonic() < deadline:
            time.sleep(0.05)
        family = running.family()
        assert family
        running.process.terminate()
        assert running.process.wait(STOPS_WITHIN_S) == 0
        assert all(map(gone, family))
    finally:
        running.kill()


def test_a_dead_supervisor_leaves_no_orphans(exported_bundle: Bundle, tmp_path: Path) -> None:
    running = start(exported_bundle, tmp_path, UNI_INSTRUCT_UI="false")
    try:
        running.until_announced()
        family = running.family()
        running.family()[0].kill()
        assert running.process.wait(PATIENCE_S) == 1
        assert all(map(gone, family))
        assert "error: the server ended with exit code -9" in running.log.read_text()
    finally:
        running.kill()


def test_without_a_name_it_serves_what_ships(tmp_path: Path) -> None:
    running = start(None, tmp_path, UNI_INSTRUCT_UI="false")
    try:
        running.until_announced()
        assert f"generator  {default_generator()}\n" in running.log.read_text()
        assert httpx.get(f"{running.url}/v1/spec").json()["name"] == default_generator()
        listed = httpx.get(f"{running.url}/v1/models").json()["data"]
        assert [(model["id"], model["state"]) for model in listed] == [(name, "ready") for name in default_sources()]
        for name in shipped_generators():
            body = {"model": name, "seeds": [7], "format": "npz"}
            answer = httpx.post(f"{running.url}/v1/generate", json=body)
            images = np.load(io.BytesIO(answer.content))["arr_0"]
            engine = open_engine(name, answer.headers["x-engine"])
            assert answer.headers["x-model"] == name
            np.testing.assert_array_equal(images, generate_images(engine, [7], resolve_class_ids(engine.spec, [7])))
        answer = httpx.post(f"{running.url}/v1/generate", json={"seeds": [7]})
        np.testing.assert_array_equal(pixels(answer.content), truth(Bundle.open(default_generator()), [7])[0])
    finally:
        running.kill()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "BUNDLE",
            "missing",
            "there is no bundle missing; give a folder that 'train' wrote, hf://owner/name, or a shipped generator: ",
        ),
        ("ENGINE", "gpu", "engine 'gpu' is unknown"),
    ],
)
def test_the_environment_names_what_the_command_does_not(name: str, value: str, message: str) -> None:
    done = run_cli("serve", env={**os.environ, f"UNI_INSTRUCT_{name}": value})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")


def test_several_workers_serve_without_the_demo(exported_bundle: Bundle, tmp_path: Path) -> None:
    running = start(exported_bundle, tmp_path, "--workers", "2")
    try:
        running.until_announced()
        assert "demo       off" in running.log.read_text()
        for seed in range(10):
            answer = httpx.post(f"{running.url}/v1/generate", json={"seeds": [seed]})
            np.testing.assert_array_equal(pixels(answer.content), truth(exported_bundle, [seed])[0])
        assert httpx.get(f"{running.url}/ui").status_code == 404
        metrics = httpx.get(f"{running.url}/metrics").text
        assert 'uni_instruct_images_total{model="tiny"} 10.0' in metrics  # summed over the workers
        assert "uni_instruct_ready 2.0" in metrics
    finally:
        running.kill()


def refused(*arguments: str) -> str:
    """Standard error of a command that must be refused with exit code 2."""
    done = run_cli("serve", *arguments)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_wrong_requests_are_one_line_and_exit_code_2(exported_bundle: Bundle, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        message = refused(str(exported_bundle.path), "--port", port)
        assert message == f"error: port {port} is already in use; choose another --port\n"
    assert refused(str(tmp_path / "nothing")).startswith("error: there is no bundle")
    assert refused(str(exported_bundle.path), "--engine", "abacus").startswith("error: engine 'abacus' is unknown; choose one")
    assert refused(str(exported_bundle.path), "--host", "no.such.host.invalid").startswith("error: host no.such.host.invalid")
    latents = random_bundle(tmp_path / "latents", seed=0, image_shape=(4, 8, 8), latents=True)
    assert (
        "makes a VAE's latents and has no decoder to turn them into pictures; add the VAE's decoder: uni-instruct import"
        in refused(str(latents.path))
    )
    assert "0 is not in the range" in refused(str(exported_bundle.path), "--port", "0")
    altered = Path(shutil.copytree(exported_bundle.path, tmp_path / "altered"))
    (altered / "engines/onnx-fp32/tiny-8x8-onnx-fp32.onnx").write_bytes(b"altered")
    assert "does not match the sha256" in refused(str(altered))
    (altered / "model.safetensors").write_bytes(b"altered")
    assert "does not match the sha256" in refused(str(altered), "--engine", "torch")


def test_workers_that_cannot_live_end_the_command(exported_bundle: Bundle, tmp_path: Path) -> None:
    """As where memory or disk is too small: the supervisor alone would start the next one for ever."""
    killed = "import os, sys\nif '_bentoml_impl.worker.service' in sys.orig_argv:\n    os.kill(os.getpid(), 7)\n"
    (tmp_path / "sitecustomize.py").write_text(killed)
    running = start(exported_bundle, tmp_path, "--no-ui", "--workers", "2", PYTHONPATH=str(tmp_path))
    try:
        assert running.process.wait(PATIENCE_S) == 1
        assert "error: worker processes end before they are ready (" in running.log.read_text()
    finally:
        running.kill()


def test_an_engine_that_cannot_be_loaded_ends_the_command(exported_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK_TORCH)
    running = start(exported_bundle, tmp_path, "--engine", "torch", PYTHONPATH=str(tmp_path), UNI_INSTRUCT_UI="false")
    try:
        assert running.process.wait(PATIENCE_S) == 2
        assert running.log.read_text().splitlines()[-1].startswith("error: package 'torch' is not installed; pip install")
    finally:
        running.kill()
