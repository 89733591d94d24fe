"""A bundle that changes on disk takes the place of the one that is served, and nobody notices but by the images."""

import asyncio
import io
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest

from builders.bundles import random_bundle
from builders.serving import app_of, client_of, metric, run
from uni_instruct.bundle import WEIGHTS, Bundle
from uni_instruct.engine import open_engine
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.serve.models.reload import fingerprint
from uni_instruct.system.files import atomic_folder

SEED = 7


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("newer") / "bundle", seed=77)


def picture(bundle: Bundle) -> np.ndarray:
    return generate_images(open_engine(bundle, "torch"), [SEED], resolve_class_ids(bundle.spec, [SEED]), batch=1)


def replace(folder: Path, by: Bundle) -> None:
    """As `train` and `export` do it: whole, by a rename."""
    with atomic_folder(folder) as partial:
        shutil.copytree(by.path, partial, dirs_exist_ok=True)


async def weights(client: httpx.AsyncClient) -> str:
    return str((await client.get("/v1/spec")).json()["weights_sha256"])


def test_a_changed_bundle_is_taken_up_without_a_lost_request(tiny_bundle: Bundle, newer: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / "served"))
    truths = {bundle.weights_sha256: picture(bundle).astype(int) for bundle in (tiny_bundle, newer)}

    async def work() -> None:
        stop = asyncio.Event()

        async def ask() -> list[int]:
            statuses = []
            while not stop.is_set():
                answer = await client.post("/v1/generate", json={"seeds": [SEED], "format": "npz"})
                statuses.append(answer.status_code)
                image = np.load(io.BytesIO(answer.content))["arr_0"]
                # The older's or the newer's, but for the last rounding: never a mixture.
                assert min(np.abs(image - truth).max() for truth in truths.values()) <= 1
            return statuses

        async with client_of(app_of(folder, reload_s=0.05)) as client:
            assert await weights(client) == tiny_bundle.weights_sha256
            asking = [asyncio.create_task(ask()) for _ in range(8)]
            await asyncio.sleep(0.2)
            replace(folder, newer)
            while await weights(client) != newer.weights_sha256:
                assert not any(task.done() for task in asking)
                await asyncio.sleep(0.01)
            after = await client.post("/v1/generate", json={"seeds": [SEED], "format": "npz"})
            assert np.abs(np.load(io.BytesIO(after.content))["arr_0"] - truths[newer.weights_sha256]).max() <= 1
            await asyncio.sleep(0.2)
            stop.set()
            for statuses in await asyncio.gather(*asking):
                assert statuses
                assert set(statuses) == {200}
            assert await metric(client, 'uni_instruct_reloads_total{model="tiny",outcome="loaded"}') == 1
            assert await metric(client, 'uni_instruct_dropped_images_total{model="tiny"') == 0
            assert await metric(client, "uni_instruct_queue_images") == 0

    run(work())


def test_a_damaged_one_is_not_taken_up_and_a_mended_one_is(tiny_bundle: Bundle, newer: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / "served"))

    async def work() -> None:
        async with client_of(app_of(folder, reload_s=0.05)) as client:
            (folder / WEIGHTS).write_bytes(b"half a copy")
            while await metric(client, 'uni_instruct_reloads_total{model="tiny",outcome="failed"}') == 0:
                await asyncio.sleep(0.01)
            assert (await client.post("/v1/generate", json={})).status_code == 200
            assert (await client.get("/readyz")).text == "ready\ntiny: ready\n"
            replace(folder, newer)
            while await weights(client) != newer.weights_sha256:
                await asyncio.sleep(0.01)
            # Once for each state of the files, not once for each look at them.
            assert await metric(client, 'uni_instruct_reloads_total{model="tiny",outcome="failed"}') == 1

    run(work())


def test_one_that_was_missing_is_served_once_it_is_there(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "later"

    async def work() -> None:
        async with client_of(app_of(tiny_bundle, f"later={folder}", reload_s=0.05)) as client:
            assert (await client.post("/v1/generate", json={"model": "later"})).status_code == 503
            replace(folder, tiny_bundle)
            while "later: ready" not in (await client.get("/readyz")).text:
                await asyncio.sleep(0.01)
            assert (await client.post("/v1/generate", json={"model": "later"})).status_code == 200

    run(work())


def test_what_counts_as_a_change(tiny_bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bundle.path, tmp_path / "served"))
    before = fingerprint(str(folder))
    assert before == fingerprint(str(folder))
    (folder / "README.md").write_text("another card")
    assert fingerprint(str(folder)) == before
    (folder / "engines/onnx-fp32").mkdir(parents=True)
    (folder / "engines/onnx-fp32/engine.json").write_text("{}")
    assert fingerprint(str(folder)) != before
    assert fingerprint(str(tmp_path / "nothing")) is None
    assert fingerprint("hf://owner/name") is None
