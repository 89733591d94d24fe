"""The HTTP app on a real engine, in this process: what needs a slow, broken or guarded server."""

import asyncio
import base64
import io
import json
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from builders.bundles import ONNX
from builders.serving import FOREVER_S, app_of, client_of, metric, run
from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine, open_engine
from uni_instruct.engines.record import RECORD
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.serve.app import create_app
from uni_instruct.serve.models import registry as models
from uni_instruct.serve.models import served_model
from uni_instruct.serve.settings import Settings
from uni_instruct.system.files import sha256


class Held:
    """An engine that, once it is warm, waits until the test lets it run."""

    def __init__(self, engine: Engine):
        # Of no device that there is: what is quick on the CPU runs on the event loop, where the test would wait for itself.
        self.spec, self.id, self.device = engine.spec, engine.id, "held"
        self.mixes_classes = engine.mixes_classes
        self.released = threading.Event()
        self.released.set()
        self.calls = 0
        self._engine = engine

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        self.calls += 1
        self.released.wait(FOREVER_S)
        return self._engine(noise, class_ids)

    def close(self) -> None:
        self._engine.close()


@pytest.fixture
def held(tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Held:
    engine = Held(open_engine(tiny_bundle, "torch"))
    monkeypatch.setattr(served_model, "load_engine", lambda bundle, stored, device, spin: engine)
    return engine


def test_the_same_seed_gives_the_pixels_that_generate_gives(tiny_bundle: Bundle) -> None:
    engine = open_engine(tiny_bundle, "torch")

    async def work() -> None:
        async with client_of(app_of(tiny_bundle)) as client:
            for seed in (0, 7, 2**63 - 1):
                answer = await client.post("/v1/generate", json={"seeds": [seed]})
                assert answer.headers["content-type"] == "image/png"
                assert answer.headers["x-seeds"] == str(seed)
                class_ids = resolve_class_ids(engine.spec, [seed])
                assert class_ids is not None
                assert answer.headers["x-class-ids"] == str(class_ids[0])
                picture = np.asarray(Image.open(io.BytesIO(answer.content)))
                np.testing.assert_array_equal(picture, generate_images(engine, [seed], class_ids)[0, :, :, 0])

    run(work())


def test_drawn_seeds_are_named_and_give_the_same_images_again(tiny_bundle: Bundle) -> None:
    async def work() -> None:
        async with client_of(app_of(tiny_bundle)) as client:
            first = await client.post("/v1/generate", json={"num_images": 3, "format": "npz"})
            drawn = np.load(io.BytesIO(first.content))
            body = {"seeds": drawn["seeds"].tolist(), "class_ids": drawn["class_ids"].tolist(), "format": "npz"}
            again = np.load(io.BytesIO((await client.post("/v1/generate", json=body)).content))
            np.testing.assert_array_equal(drawn["arr_0"], again["arr_0"])
            stages = [part.split(";")[0] for part in first.headers["server-timing"].split(", ")]
            assert stages == ["queue", "model", "encode"]

    run(work())


def test_it_answers_before_the_generator_is_loaded(tiny_bundle: Bundle, held: Held) -> None:
    held.released.clear()

    async def work() -> None:
        async with client_of(app_of(tiny_bundle), wait=False) as client:
            while held.calls == 0:
                assert (await client.get("/readyz")).status_code == 503
                await asyncio.sleep(0.01)
            assert (await client.get("/livez")).status_code == 200
            early = await client.post("/v1/generate", json={})
            assert early.status_code == 503
            assert early.json()["error"]["code"] == "not_ready"
            held.released.set()
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
            assert (await client.post("/v1/generate", json={})).status_code == 200

    run(work())


def test_a_generator_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    app = create_app(Settings(bundle=str(tmp_path / "nothing"), ui=False))

    async def work() -> None:
        async with client_of(app, wait=False) as client:
            while (await client.get("/livez")).status_code == 200:
                await asyncio.sleep(0.01)
            assert (await client.get("/readyz")).status_code == 503
            answer = await client.get("/v1/spec")
            assert answer.status_code == 503
            assert "nothing could not be loaded: there is no bundle" in answer.json()["error"]["message"]

    run(work())


def test_a_full_queue_is_429_and_slowness_504(tiny_bundle: Bundle, held: Held) -> None:
    async def work() -> None:
        app = app_of(tiny_bundle, queue_images=8, request_images=8, max_batch=1, timeout_s=0.2)
        async with client_of(app) as client:
            held.released.clear()
            waiting = [asyncio.create_task(client.post("/v1/generate", json={"seeds": [n]})) for n in range(12)]
            answers = await asyncio.gather(*waiting)
            statuses = [answer.status_code for answer in answers]
            assert sorted(set(statuses)) == [429, 504]
            refused = answers[statuses.index(429)]
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["type"] == "rate_limit_error"
            late = answers[statuses.index(504)].json()["error"]
            assert late["message"] == "1 images were not made within 0.2 s; ask for fewer at once, or try later"
            assert await metric(
                client, 'uni_instruct_dropped_images_total{model="tiny",reason="queue_full"}'
            ) == statuses.count(429)
            assert await metric(client, 'uni_instruct_dropped_images_total{model="tiny",reason="timeout"}') == statuses.count(
                504
            )
            assert await metric(client, "uni_instruct_queue_images") == 0
            held.released.set()

    run(work())


def test_who_waits_too_long_for_an_encoder_is_told(tiny_bundle: Bundle) -> None:
    """A request has one time limit for all of it; pictures of others may stand before its own."""

    async def work() -> None:
        app, free = app_of(tiny_bundle, timeout_s=2), threading.Event()
        archive = {"seeds": list(range(9)), "format": "zip"}
        async with client_of(app) as client:
            for _ in range(models._ENCODER_THREADS):
                app.state.models.encoders.submit(free.wait, FOREVER_S)
            late = await client.post("/v1/generate", json=archive)
            # A small picture needs no encoder's thread, and the same request is answered once one is free.
            small = await client.post("/v1/generate", json={"seeds": [7]})
            free.set()
            again = await client.post("/v1/generate", json=archive)
            assert [answer.status_code for answer in (late, small, again)] == [504, 200, 200]
            expected = "9 images were made, but not encoded in 2 s; ask for fewer, for smaller ones, or try later"
            assert late.json()["error"]["message"] == expected
            assert await metric(client, 'uni_instruct_dropped_images_total{model="tiny",reason="timeout"}') == 9

    run(work())


def test_a_client_that_leaves_frees_its_place(tiny_bundle: Bundle, held: Held) -> None:
    async def work() -> None:
        app = app_of(tiny_bundle, max_batch=1)
        async with client_of(app) as client:
            held.released.clear()
            messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
            body = json.dumps({"num_images": 20}).encode()
            messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
            sent: list[Any] = []
            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/generate",
                "raw_path": b"/v1/generate",
                "query_string": b"",
                "headers": [],
            }

            async def send(message: Any) -> None:
                sent.append(message)

            left = asyncio.create_task(app({**scope}, messages.get, send))
            while await metric(client, "uni_instruct_queue_images") < 19:
                await asyncio.sleep(0.01)
            messages.put_nowait({"type": "http.disconnect"})
            await left
            assert sent[0]["status"] == 499
            assert await metric(client, "uni_instruct_queue_images") == 0
            assert await metric(client, 'uni_instruct_dropped_images_total{model="tiny",reason="cancelled"}') == 20
            held.released.set()

    run(work())


def test_the_api_key_guards_everything_but_health_and_preflight(tiny_bundle: Bundle) -> None:
    basic = base64.b64encode(b"anyone:sesame").decode()
    good = ["Bearer sesame", "bearer sesame", f"Basic {basic}"]
    bad = ["", "Bearer", "Bearer open", "Basic !", f"Basic {base64.b64encode(b'sesame:').decode()}", "sesame", "Bearer é"]

    async def work() -> None:
        async with client_of(app_of(tiny_bundle, api_key="sesame")) as client:
            for path in ("/livez", "/readyz", "/healthz"):
                assert (await client.get(path)).status_code == 200
            assert (await client.options("/v1/generate")).status_code != 401
            for header in bad:
                headers = {"Authorization": header.encode()} if header else {}
                for method, path in (("POST", "/v1/generate"), ("GET", "/metrics"), ("GET", "/"), ("GET", "/nowhere")):
                    answer = await client.request(method, path, headers=headers)
                    assert answer.status_code == 401
                    assert answer.json()["error"]["code"] == "invalid_api_key"
            for header in good:
                answer = await client.post("/v1/generate", json={}, headers={"Authorization": header})
                assert answer.status_code == 200
        async with client_of(app_of(tiny_bundle, api_key="sesame", metrics_open=True)) as client:
            assert (await client.get("/metrics")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 401

    run(work())


def test_a_large_body_is_413_also_without_a_length(tiny_bundle: Bundle) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    async def work() -> None:
        async with client_of(app_of(tiny_bundle, max_body_bytes=1000)) as client:
            for content in (b" " * 1001, chunks()):
                answer = await client.post("/v1/generate", content=content)
                assert answer.status_code == 413
                assert answer.json()["error"]["message"].startswith("the body is larger than 1000 bytes")
            assert (await client.post("/v1/generate", content=b"{}".ljust(1000))).status_code == 200

    run(work())


def test_the_metrics_do_not_grow_with_what_is_asked(tiny_bundle: Bundle) -> None:
    async def work() -> None:
        async with client_of(app_of(tiny_bundle)) as client:
            await client.get("/nowhere")
            before = len((await client.get("/metrics")).text.splitlines())
            before = len((await client.get("/metrics")).text.splitlines())
            for number in range(50):
                assert (await client.get(f"/nowhere/{number}")).status_code == 404
            assert len((await client.get("/metrics")).text.splitlines()) == before
            assert await metric(client, 'uni_instruct_requests_total{route="unknown",status="404"}') == 51

    run(work())


def test_every_answer_is_counted_under_a_route(tiny_bundle: Bundle) -> None:
    async def work() -> None:
        async with client_of(app_of(tiny_bundle, ui=True), wait=False) as client:
            for method, path, route, status in (
                ("OPTIONS", "/v1/generate", "unknown", 405),
                ("GET", "/v1/walk", "unknown", 405),
                ("GET", "/ui", "/ui", 307),
                ("GET", "/ui/gradio_api/upload", "/ui", 503),
                ("GET", "/ui/pages/demo.js", "/ui", 200),
                ("GET", "/static_content/swagger-ui.css", "/static_content", 200),
                ("GET", "/static_content/nothing", "unknown", 404),
            ):
                series = f'uni_instruct_requests_total{{route="{route}",status="{status}"}}'
                before = await metric(client, series)
                assert (await client.request(method, path)).status_code == status, path
                assert await metric(client, series) == before + 1, path

    run(work())


def test_the_answers_for_wrong_paths_and_methods(tiny_bundle: Bundle) -> None:
    async def work() -> None:
        async with client_of(app_of(tiny_bundle)) as client:
            missing = await client.get("/v2/generate")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
            wrong = await client.get("/v1/generate")
            assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
            assert wrong.json()["error"]["message"] == "/v1/generate does not support GET; use POST"

    run(work())


def test_an_engine_that_is_refused_here_is_named_to_everybody(
    exported_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the header of every answer, in /v1/spec and in the metrics: torch runs where an engine should."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = Bundle.open(shutil.copytree(exported_bundle.path, tmp_path / "bundle"))
    folder = bundle.engine_folder(ONNX)
    record = json.loads((folder / RECORD).read_text())
    (folder / record["file"]).write_bytes(b"")
    (folder / RECORD).write_text(json.dumps(record | {"file_sha256": sha256(folder / record["file"])}))

    async def work() -> None:
        async with client_of(app_of(bundle, engine=None)) as client:
            headers = (await client.post("/v1/generate", json={"seeds": [1]})).headers
            assert (headers["x-engine"], headers["x-engines-refused"]) == ("torch-fp32", "onnx-fp32")
            engines = {engine["engine_id"]: engine for engine in (await client.get("/v1/spec")).json()["engines"]}
            assert engines["torch-fp32"]["state"] == "trusted"
            assert engines["onnx-fp32"]["state"] == "refused"
            assert "ONNX Runtime cannot load" in engines["onnx-fp32"]["reason"]
            assert 'uni_instruct_engine{engine="torch-fp32",model="tiny"} 1.0' in (await client.get("/metrics")).text

    run(work())


def test_what_is_served_is_described(tiny_bundle: Bundle) -> None:
    async def work() -> None:
        async with client_of(app_of(tiny_bundle, max_batch=8)) as client:
            spec = (await client.get("/v1/spec")).json()
            assert spec["image_shape"] == [1, 8, 8]
            assert spec["class_names"] == [str(n) for n in range(10)]
            assert (spec["engine"], spec["precision"], spec["weights_sha256"]) == (
                "torch-fp32",
                "fp32",
                tiny_bundle.weights_sha256,
            )
            assert [engine["engine_id"] for engine in spec["engines"]] == ["torch-fp32"]
            assert set(spec["batch_sizes"]) <= {1, 2, 4, 8}
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
            fields = (await client.get("/openapi.json")).json()["paths"]["/v1/generate"]["post"]["requestBody"]
            assert "seeds" in fields["content"]["application/json"]["schema"]["properties"]
            assert 'href="ui/"' in (await client.get("/")).text

    run(work())


def test_the_demo_waits_and_keeps_gradios_other_doors_shut(tiny_bundle: Bundle) -> None:
    async def work() -> None:
        async with client_of(app_of(tiny_bundle, ui=True), wait=False) as client:
            early = await client.get("/ui/")
            assert early.status_code == 503
            assert "warming up" in early.text
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.05)
            page = await client.get("/ui/")
            assert page.status_code == 200
            assert 'src="pages/demo.js"' in page.text
            head = page.text.partition("</head>")[0]
            assert not [host for host in ("githubusercontent", "gradio.app", "googleapis") if host in head]
            slash = await client.get("/ui?tab=grid")
            assert (slash.status_code, slash.headers["location"]) == (307, "ui/?tab=grid")
            script = await client.get("/ui/pages/demo.js")
            assert (script.status_code, script.headers["cache-control"]) == (200, "no-cache")
            for path in ("/ui/pages/..%2fservice.py", "/ui/openapi.json", "/ui/gradio_api/file=/etc/passwd", "/ui/docs"):
                assert (await client.get(path)).status_code == 404
            for path in ("upload", "queue/join", "call/lambda", "run/predict"):
                assert (await client.post(f"/ui/gradio_api/{path}", files={"files": b"x"})).status_code == 404

    run(work())
