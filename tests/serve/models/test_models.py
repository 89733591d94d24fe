"""Several generators in one server: chosen by name, one failing alone, one thread a device."""

import asyncio
import io
from pathlib import Path

import numpy as np
import pytest

from builders.bundles import random_bundle
from builders.serving import app_of, client_of, metric, run
from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.errors import RequestError
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.serve.batching.batcher import Batcher
from uni_instruct.serve.batching.device_thread import DeviceThread
from uni_instruct.serve.metrics import ServerMetrics
from uni_instruct.serve.model_sources import sources_by_name, split_sources


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Another generator than `tiny_bundle`: colours, and no classes."""
    return random_bundle(tmp_path_factory.mktemp("models") / "plain", seed=9, num_classes=0, image_shape=(3, 8, 8))


def truth(bundle: Bundle, seeds: list[int]) -> np.ndarray:
    return generate_images(open_engine(bundle, "torch"), seeds, resolve_class_ids(bundle.spec, seeds))


def test_requests_choose_their_model(tiny_bundle: Bundle, plain: Bundle) -> None:
    async def work() -> None:
        app = app_of(f"grey={tiny_bundle.path}", f"colour={plain.path}")
        async with client_of(app) as client:
            for name, bundle in ((None, tiny_bundle), ("grey", tiny_bundle), ("colour", plain)):
                body = {"seeds": [3, 4], "format": "npz"} | ({"model": name} if name else {})
                answer = await client.post("/v1/generate", json=body)
                assert answer.headers["x-model"] == (name or "grey")
                # Two seeds may run as one batch or as two: torch then differs in the last rounding.
                images = np.load(io.BytesIO(answer.content))["arr_0"].astype(int)
                assert np.abs(images - truth(bundle, [3, 4])).max() <= 1
                spec = (await client.get("/v1/spec", params={"model": name} if name else {})).json()
                assert (spec["name"], spec["image_shape"]) == (name or "grey", list(bundle.spec.image_shape))
                assert spec["weights_sha256"] == bundle.weights_sha256
            assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["grey", "colour"]
            assert (await client.get("/v1/models/colour")).json()["id"] == "colour"
            assert await metric(client, 'uni_instruct_images_total{model="grey"}') == 4
            assert await metric(client, 'uni_instruct_images_total{model="colour"}') == 2
            assert (await client.get("/readyz")).text == "ready\ngrey: ready\ncolour: ready\n"

    run(work())


def test_an_unknown_model_is_404_and_names_the_others(tiny_bundle: Bundle, plain: Bundle) -> None:
    async def work() -> None:
        async with client_of(app_of(f"grey={tiny_bundle.path}", f"colour={plain.path}")) as client:
            for answer in (
                await client.post("/v1/generate", json={"model": "red"}),
                await client.get("/v1/spec?model=red"),
                await client.get("/v1/models/red"),
            ):
                error = answer.json()["error"]
                assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
                assert error["message"] == "no model 'red' is served; choose one of grey, colour"
            assert (await client.post("/v1/models/grey")).headers["allow"] == "GET"

    run(work())


@pytest.mark.parametrize("order", [0, 1])
def test_one_that_fails_to_load_leaves_the_others_alone(tiny_bundle: Bundle, tmp_path: Path, order: int) -> None:
    sources = [f"good={tiny_bundle.path}", f"bad={tmp_path / 'nothing'}"]

    async def work() -> None:
        async with client_of(app_of(*sources[:: -1 if order else 1])) as client:
            ready = await client.get("/readyz")
            assert {"ready", "good: ready", "bad: failed"} == set(ready.text.split("\n")[:-1])
            assert (await client.get("/livez")).status_code == 200
            assert (await client.post("/v1/generate", json={"model": "good"})).status_code == 200
            answer = await client.post("/v1/generate", json={"model": "bad"})
            assert answer.status_code == 503
            assert "the generator bad could not be loaded: there is no bundle" in answer.json()["error"]["message"]
            assert await metric(client, 'uni_instruct_model_ready{model="good"}') == 1
            assert await metric(client, 'uni_instruct_model_ready{model="bad"}') == 0
            states = {model["id"]: model["state"] for model in (await client.get("/v1/models")).json()["data"]}
            assert states == {"good": "ready", "bad": "failed"}

    run(work())


def test_models_on_one_device_take_turns(tiny_bundle: Bundle) -> None:
    """While one model runs, the batch of the other goes on filling; then it is the other's turn."""
    engine = open_engine(tiny_bundle, "torch")
    calls: list[tuple[str, int]] = []

    class Noting:
        def __init__(self, name: str):
            self.name, self.spec, self.id, self.device = name, engine.spec, engine.id, engine.device

        def __call__(self, z: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
            calls.append((self.name, len(z)))
            return engine(z, class_ids)

    async def work() -> None:
        device, metrics = DeviceThread(), ServerMetrics()
        first, second = (
            Batcher(Noting(name), (1, 2, 4), 64, metrics.of_model(name), device)  # type: ignore[arg-type]
            for name in ("first", "second")
        )
        ids = np.zeros(8, dtype=np.int64)
        waiting = [asyncio.create_task(first.submit(range(8), ids, 60))]
        waiting += [asyncio.create_task(second.submit([n], ids[:1], 60)) for n in range(4)]
        await asyncio.gather(*waiting)
        await first.close()
        await second.close()
        device.close()

    run(work())
    assert calls == [("first", 4), ("second", 4), ("first", 4)]


def test_names_of_models(tiny_bundle: Bundle, tmp_path: Path) -> None:
    assert sources_by_name(["digits", f"mine={tiny_bundle.path}", str(tiny_bundle.path)]) == {
        "digits": "digits",
        "mine": str(tiny_bundle.path),
        "tiny": str(tiny_bundle.path),
    }
    assert sources_by_name(["hf://owner/some-model@v1"]) == {"some-model": "hf://owner/some-model@v1"}
    odd = tmp_path / "a=b c"
    odd.mkdir()
    assert sources_by_name([str(odd)]) == {"a-b-c": str(odd)}
    with pytest.raises(RequestError, match="are both called tiny; give one a name of its own: other="):
        sources_by_name([str(tiny_bundle.path)] * 2)
    assert split_sources("digits, emoji,") == ["digits", "emoji"]
    assert split_sources('["x=/a,b", "emoji"]') == ["x=/a,b", "emoji"]
    assert split_sources("[odd") == ["[odd"]
