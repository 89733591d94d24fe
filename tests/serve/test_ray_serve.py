"""The app on Ray Serve: the same images, errors and batches, and replicas that are asked only when they are warm."""

import io
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from builders.servers import Running, free_port
from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.errors import MissingExtraError, RequestError
from uni_instruct.generate import generate_images
from uni_instruct.serve.ray_serve import Placement, parse
from uni_instruct.system.ray_cluster import import_ray_serve


def test_arguments_are_settings_and_where_they_run(exported_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNI_INSTRUCT_TIMEOUT_S", "7")
    monkeypatch.setenv("UNI_INSTRUCT_WORKERS", "3")
    monkeypatch.chdir(exported_bundle.path.parent)
    asked = {
        "bundle": f"mine={exported_bundle.path.name}",
        "engine": "onnx",
        "queue_images": "300",
        "replicas": "2",
        "gpus": "0.5",
    }
    placement, settings = parse(asked)
    assert settings.bundle == (f"mine={exported_bundle.path}",)
    assert (settings.engine, settings.queue_images, settings.timeout_s, settings.workers) == ("onnx", 300, 7.0, 1)
    assert placement == Placement(replicas=2, cpus=1.0, gpus=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bundel": "digits"}, "'bundel' is not a setting; choose from access_log, "),
        ({"replicas": "two"}, "replicas=two is not possible; give an integer from 1 to 10000"),
        ({"replicas": "0"}, "replicas=0 is not possible; give an integer from 1 to 10000"),
        ({"replicas": "20000"}, "replicas=20000 is not possible; give an integer from 1 to 10000"),
        ({"cpus": "nan"}, "cpus=nan is not possible; give a number, such as 2"),
        ({"timeout_s": "soon"}, "UNI_INSTRUCT_TIMEOUT_S is soon; give a number"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError) as error:
        parse(arguments)
    assert str(error.value).startswith(message)


def test_without_ray_serve_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'uni-instruct\[ray-serve\]'"):
        import_ray_serve()


@pytest.fixture(scope="module")
def server(exported_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two replicas on a Ray of this machine, as docs/scaling.md starts them."""
    pytest.importorskip("ray.serve")
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_DEFAULT_HTTP_PORT": str(port),
        # The paths of its sockets must be short.
        "RAY_TMPDIR": "/tmp",
    }
    config = folder / "serve.yaml"
    config.write_text(CONFIG.format(port=port, bundle=exported_bundle.path))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(config)]
    running = Running(command, environment, port, folder, cwd=folder)
    try:
        running.until_ready()
        yield running
    finally:
        running.process.terminate()  # it stops its Ray, which `kill` would leave running
        try:
            running.process.wait(60)
        except subprocess.TimeoutExpired:
            running.kill()


CONFIG = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - name: images
    route_prefix: /
    import_path: uni_instruct.serve.ray_serve:build
    args: {{bundle: "mine={bundle}", engine: onnx, replicas: "2", cpus: "0.5", access_log: "true"}}
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_replicas_make_the_images_of_one_server(server: Running, exported_bundle: Bundle) -> None:
    truth = generate_images(open_engine(exported_bundle, "onnx"), range(96))

    def asked(seed: int) -> np.ndarray:
        body = {"seeds": [seed], "format": "npz"}
        answer = httpx.post(f"{server.url}/v1/generate", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return np.load(io.BytesIO(answer.content))["arr_0"][0]

    with ThreadPoolExecutor(32) as threads:
        images = list(threads.map(asked, range(96)))
    np.testing.assert_array_equal(np.stack(images), truth)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_errors_metrics_and_the_page_are_those_of_the_app(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v1/generate", json={"seeds": [1], "model": "none"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "mine"
    assert "uni_instruct_batch_images_count" in httpx.get(f"{server.url}/metrics").text
    assert httpx.get(f"{server.url}/ui").status_code == 404  # two replicas: its state would be in one of them
    assert httpx.get(f"{server.url}/livez").text == "alive\n"
