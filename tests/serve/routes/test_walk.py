"""POST /v1/walk, /v1/compare and GET /v1/about on a real engine, in this process."""

import asyncio
import base64
import dataclasses
import io
import json
import re
import shutil
import threading
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from builders.paths import FORMAT_1
from builders.serving import FOREVER_S, app_of, client_of, run
from uni_instruct.bundle import Bundle
from uni_instruct.engine import Engine, open_engine
from uni_instruct.errors import RequestError
from uni_instruct.generate import mix_classes, resolve_class_ids
from uni_instruct.images import grid
from uni_instruct.noise import Between, NoisePoint, draw_inputs
from uni_instruct.serve.demo import mount as demo_module
from uni_instruct.serve.demo.compare import SideBySide, class_ids_of_teacher, find_teacher
from uni_instruct.serve.routes.walk import WalkRequest, resolve_walk


@pytest.fixture(scope="module")
def digits() -> Bundle:
    """The smallest that ships, with its engine."""
    return Bundle.open("digits")


@pytest.fixture(scope="module")
def engine(digits: Bundle) -> Engine:
    return open_engine(digits, "onnx")


@pytest.fixture(autouse=True)
def without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page itself is tested in a browser; importing Gradio takes seconds."""

    def no_page() -> Any:
        raise RuntimeError("not in this test")

    monkeypatch.setattr(demo_module, "_gradio_app", no_page)


@asynccontextmanager
async def client_of_demo(bundle: Bundle, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app_of(bundle, **{"engine": "onnx", "ui": True, **settings})) as client:
        yield client


def truth(engine: Engine, points: list[NoisePoint], class_ids: list[int]) -> np.ndarray:
    return engine(*draw_inputs(engine.spec, points, np.array(class_ids, dtype=np.int64)))


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_place_between_two_seeds_is_the_picture_of_the_noise_there(digits: Bundle, engine: Engine) -> None:
    async def work() -> None:
        async with client_of_demo(digits) as client:
            body = {"seeds": [7, 8, 9], "positions": [1.25], "class_ids": [3]}
            answer = await client.post("/v1/walk", json=body)
            assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
            assert answer.headers["x-class-ids"] == "3"
            assert [part.split(";")[0] for part in answer.headers["server-timing"].split(", ")] == ["queue", "model", "encode"]
            np.testing.assert_array_equal(pixels(answer.content), truth(engine, [Between(8, 9, 0.25)], [3])[0, :, :, 0])
            # At a stop it is the seed's own picture, as /v1/generate makes it.
            stop = await client.post("/v1/walk", json={**body, "positions": [1]})
            generated = await client.post("/v1/generate", json={"seeds": [8], "class_ids": [3]})
            np.testing.assert_array_equal(pixels(stop.content), pixels(generated.content))

    run(work())


def test_classes_of_stops_morph_as_the_noise_does(digits: Bundle, engine: Engine) -> None:
    async def work() -> None:
        async with client_of_demo(digits) as client:
            body = {"seeds": [7, 8, 9], "positions": [0, 0.25, 1, 1.5, 2], "classes": ["1", "3", "3"], "format": "zip"}
            answer = await client.post("/v1/walk", json=body)
            assert answer.headers["x-class-ids"] == "1,1-to-3-at-0.250,3,3,3"
            points: list[NoisePoint] = [7, Between(7, 8, 0.25), 8, Between(8, 9, 0.5), 9]
            mixture = mix_classes(engine.spec, [1, 1, 3, 3, 3], [3] * 5, [0, 0.25, 0, 0, 0])
            expected = engine(*draw_inputs(engine.spec, points, mixture))
            with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
                for name, image in zip(archive.namelist(), expected, strict=True):
                    np.testing.assert_array_equal(pixels(archive.read(name)), image[:, :, 0])
            # One seed: the class alone changes, and is neither end's on the way.
            still = {"seeds": [7, 7], "class_ids": [1, 8], "positions": [0.5]}
            half = pixels((await client.post("/v1/walk", json=still)).content)
            ends = engine(*draw_inputs(engine.spec, [7, 7], np.array([1, 8])))[:, :, :, 0]
            np.testing.assert_array_equal(
                half, engine(*draw_inputs(engine.spec, [7], mix_classes(engine.spec, 1, 8, 0.5)))[0, :, :, 0]
            )
            assert all((half != end).mean() > 0.2 for end in ends)

    run(work())


def test_an_engine_of_before_mixtures_changes_classes_half_way() -> None:
    former = Bundle.open(FORMAT_1)
    engine = open_engine(former, "onnx")

    async def work() -> None:
        async with client_of_demo(former) as client:
            assert (await client.get("/v1/spec")).json()["mixes_classes"] is False
            body = {"seeds": [7, 8], "positions": [0.4, 0.6], "class_ids": [1, 3]}
            answer = await client.post("/v1/walk", json=body)
            assert answer.headers["x-class-ids"] == "1,3"
            expected = grid(truth(engine, [Between(7, 8, 0.4), Between(7, 8, 0.6)], [1, 3]))[:, :, 0]
            np.testing.assert_array_equal(pixels(answer.content), expected)

    run(work())


def test_seeds_may_be_strings_which_is_how_javascript_names_large_ones(digits: Bundle) -> None:
    async def work() -> None:
        async with client_of_demo(digits) as client:
            large = 2**63 - 2  # JavaScript would round it
            for path, body in (("/v1/walk", {"positions": [0.5], "format": "zip"}), ("/v1/compare", {"other": "onnx-fp32"})):
                answers = [await client.post(path, json={**body, "seeds": [seed, seed]}) for seed in (large, str(large))]
                assert [answer.status_code for answer in answers] == [200, 200], answers[1].text
                if path == "/v1/walk":
                    assert answers[0].content == answers[1].content
                    assert (answers[1].headers["x-model"], answers[1].headers["x-engine"]) == ("digits", "onnx-fp32")
                assert (await client.post(path, json={**body, "seeds": ["07", "8"]})).status_code == 400

    run(work())


def test_ways_side_by_side_and_the_class_of_the_nearer_stop(digits: Bundle, engine: Engine) -> None:
    drawn = resolve_class_ids(engine.spec, [7, 8, 9, 20, 21, 22])
    assert drawn is not None

    async def work() -> None:
        async with client_of_demo(digits) as client:
            for position, classes in ((0.49, drawn[:3]), (0.5, drawn[3:])):
                body = {"seeds": [7, 20], "positions": [position], "count": 3, "morph": False}
                answer = await client.post("/v1/walk", json=body)
                points: list[NoisePoint] = [Between(7 + way, 20 + way, position) for way in range(3)]
                expected = grid(truth(engine, points, classes.tolist()))[:, :, 0]
                np.testing.assert_array_equal(pixels(answer.content), expected)
                assert answer.headers["x-class-ids"] == ",".join(map(str, classes))
            body = {"seeds": [7, 20], "positions": [0.4, 0.6], "classes": ["1", "2"], "morph": False, "format": "zip"}
            with zipfile.ZipFile(io.BytesIO((await client.post("/v1/walk", json=body)).content)) as archive:
                assert archive.namelist() == ["00000-seed7-to-20-at-0.400.png", "00001-seed7-to-20-at-0.600.png"]
                expected = truth(engine, [Between(7, 20, 0.4), Between(7, 20, 0.6)], [1, 2])
                for name, image in zip(archive.namelist(), expected, strict=True):
                    np.testing.assert_array_equal(pixels(archive.read(name)), image[:, :, 0])

    run(work())


def test_the_animation_has_every_frame_enlarged_by_a_whole_factor(digits: Bundle, engine: Engine) -> None:
    async def work() -> None:
        async with client_of_demo(digits) as client:
            body = {"seeds": [7, 8], "frames": 5, "class_ids": [3], "format": "webp", "animated": True, "scale": 4, "fps": 25}
            answer = await client.post("/v1/walk", json=body)
            assert answer.headers["content-type"] == "image/webp"
            film = Image.open(io.BytesIO(answer.content))
            assert (film.n_frames, film.size, film.info["loop"]) == (5, (32, 32), 0)
            points: list[NoisePoint] = [7, *(Between(7, 8, n / 4) for n in (1, 2, 3)), 8]
            for number, image in enumerate(truth(engine, points, [3] * 5)):
                film.seek(number)
                frame = np.asarray(film.convert("RGB"))[:, :, 0]
                assert film.info["duration"] == 40
                np.testing.assert_array_equal(frame, image[:, :, 0].repeat(4, 0).repeat(4, 1))

    run(work())


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({}, "seeds is missing; give two or more seeds, such as [7, 8]"),
        ([], "the body is [], not an object"),
        ({"seeds": "7"}, "seeds is '7'; give two or more seeds"),
        ({"seeds": []}, "the walk has 0 stops; give 1 to 64 seeds"),
        ({"seeds": [1] * 65}, "the walk has 65 stops"),
        ({"seeds": [7, -1]}, "seed -1 is not an integer in [0, 2**63)"),
        ({"seeds": [2**63 - 1], "count": 2}, "seed 9223372036854775808 is not an integer in [0, 2**63)"),
        ({"seeds": [7, 8], "positions": [1.5]}, "position 1.5 is not on the walk; choose positions from 0 to 1"),
        ({"seeds": [7, 8], "positions": []}, "0 positions of 1 images were asked for; ask for 1 to 8 images"),
        ({"seeds": [7, 8], "positions": [0.5] * 3, "count": 3}, "3 positions of 3 images were asked for"),
        ({"seeds": [7, 8], "frames": 10**9}, "1000000000 frames of 1 images were asked for"),
        ({"seeds": [7, 8], "frames": 2, "positions": [0]}, "both positions and frames are given"),
        ({"seeds": [7, 8], "count": 0}, "count is 0; ask for at least 1"),
        ({"seeds": [7, 8], "class_ids": [12]}, "class 12 is outside 0..9"),
        ({"seeds": [7, 8], "class_ids": [1, 2, 3]}, "3 classes were given for 2 seeds"),
        ({"seeds": [7, 8], "classes": []}, "the list of classes is empty"),
        ({"seeds": [7, 8], "frames": 2, "animated": True}, 'png cannot be animated; give "format": "webp"'),
        (
            {"seeds": [7], "frames": 1, "count": 5, "animated": True, "format": "webp", "scale": 64},
            "the animation would be 1536 pixels wide; choose a scale of at most 42",
        ),
        ({"seeds": [7, 8], "speed": 3}, "field 'speed' is unknown; the fields are model, seeds, positions"),
    ],
)
def test_what_is_wrong_is_said_with_its_remedy(digits: Bundle, body: object, problem: str) -> None:
    async def work() -> None:
        async with client_of_demo(digits, request_images=8, queue_images=8, max_batch=1) as client:
            answer = await client.post("/v1/walk", content=json.dumps(body))
            assert answer.status_code == 400
            assert problem in answer.json()["error"]["message"]

    run(work())


def test_the_description_names_only_headers_that_are_sent(digits: Bundle) -> None:
    async def work() -> None:
        async with client_of_demo(digits) as client:
            paths = (await client.get("/openapi.json")).json()["paths"]
            for path, body in (("/v1/generate", {"seeds": [7]}), ("/v1/walk", {"seeds": [7, 8], "positions": [0.5]})):
                described = paths[path]["post"]["responses"]["200"]["description"]
                # Sent only if the bundle has an engine that is refused.
                named = {name.lower() for name in re.findall(r"(?:X|Server)-[\w-]+", described)} - {"x-engines-refused"}
                sent = (await client.post(path, json=body)).headers
                assert {name for name in named if name not in sent} == set(), path

    run(work())


def test_an_animation_is_bounded_in_all_of_its_frames(digits: Bundle) -> None:
    """A request of a hundred bytes would otherwise take a gigabyte, and an encoder for most of a minute."""

    def resolve(frames: int, scale: int, count: int = 1) -> None:
        film = WalkRequest(seeds=[7, 8], frames=frames, scale=scale, count=count, format="webp", animated=True)
        resolve_walk(film, digits.spec, 1024, mixes_classes=True)

    for frames, scale, count in ((256, 64, 1), (64, 64, 4), (256, 32, 4), (1024, 32, 1)):
        resolve(frames, scale, count)
        with pytest.raises(
            RequestError, match=r"frames of \d+ pixels a side are too many; choose a scale of at most"
        ) as refused:
            resolve(frames + 1, scale, count) if scale == 64 else resolve(frames, scale + 1, count)
        assert refused.value.param == "scale"
        advised = re.search(r"a scale of at most (\d+)", str(refused.value))
        assert advised is not None
        resolve(frames + (scale == 64), int(advised[1]), count)
    # Of large images too many frames are refused at any scale.
    large = dataclasses.replace(digits.spec, noise_shape=(1, 1024, 1024))
    film, advised_film = (WalkRequest(seeds=[7, 8], frames=n, scale=1, format="webp", animated=True) for n in (65, 64))
    with pytest.raises(RequestError, match="too many; choose at most 64 frames and a scale of 1"):
        resolve_walk(film, large, 1024, mixes_classes=True)
    resolve_walk(advised_film, large, 1024, mixes_classes=True)


def test_a_comparison_shows_both_sides_and_what_differs(tmp_path: Path, digits: Bundle, digits_teacher: Path) -> None:
    """In the folder of a run, where the teacher lies beside the generator."""
    bundle = Bundle.open(shutil.copytree(digits.path, tmp_path / "generator"))
    teacher = Bundle.open(shutil.copytree(digits_teacher, tmp_path / "teacher"))
    inputs = draw_inputs(bundle.spec, [7, 8], np.array([3, 3], dtype=np.int64))
    images = {"onnx-fp32": open_engine(bundle, "onnx")(*inputs), "teacher": open_engine(teacher, "torch")(*inputs)}

    async def work() -> None:
        async with client_of_demo(bundle) as client:
            about = (await client.get("/v1/about")).json()
            assert about["compare"] == [
                {"id": "teacher", "label": "teacher, 4 steps"},
                {"id": "torch-fp32", "label": "torch-fp32"},
            ]
            assert about["teacher"] == {"steps": 4, "evaluations": 7, "at_hand": True}
            answer = (await client.post("/v1/compare", json={"other": "teacher", "seeds": [7, 8], "class_ids": [3]})).json()
            assert [(side["id"], side["steps"], side["evaluations"]) for side in answer["sides"]] == [
                ("onnx-fp32", 1, 1),
                ("teacher", 4, 7),
            ]
            for side in answer["sides"]:
                assert side["model_ms"] > 0
                shown = pixels(base64.b64decode(side["b64_png"]))
                np.testing.assert_array_equal(shown, grid(images[side["id"]])[:, :, 0])
            levels = np.abs(images["onnx-fp32"].astype(int) - images["teacher"])
            told = answer["difference"]
            assert told["largest_levels"] == levels.max()
            assert told["equal_share"] == pytest.approx((levels == 0).mean(), abs=1e-6)
            shown = pixels(base64.b64decode(told["b64_png"]))
            np.testing.assert_array_equal(shown, grid((levels * told["gain"]).astype(np.uint8))[:, :, 0])

    run(work())


def test_a_teacher_is_asked_for_the_class_of_the_same_name(tmp_path: Path, digits: Bundle, digits_teacher: Path) -> None:
    names, teacher = tuple("abcdefghij"), Bundle.open(digits_teacher)
    spec = dataclasses.replace(digits.spec, class_names=names)
    for order, asked in (((*names[1:], names[0]), [2, 9]), (names, [3, 0]), ((), [3, 0]), (tuple("klmnopqrst"), None)):
        other = dataclasses.replace(teacher.spec, class_names=order)
        Bundle.write(tmp_path / "generator", spec, digits.weights(), "")
        Bundle.write(tmp_path / "teacher", other, teacher.weights(), "")
        found = find_teacher(Bundle.open(tmp_path / "generator"))
        assert (found is None) == (asked is None)
        if found is not None:
            ids = class_ids_of_teacher(found.spec, spec, np.array([3, 0]))
            assert ids is not None
            assert ids.tolist() == asked


def test_a_comparison_with_what_is_not_there_is_refused(digits: Bundle) -> None:
    async def work() -> None:
        async with client_of_demo(digits) as client:
            for body, problem in (
                ({"other": "abacus", "seeds": [7]}, "there is no 'abacus' to compare with; choose one of "),
                ({"other": "torch-fp32", "seeds": [7] * 17}, "17 images were asked for; compare 1 to 16"),
                ({"seeds": [7]}, "other is missing; give an engine id, such as torch-fp32, or teacher"),
            ):
                answer = await client.post("/v1/compare", json=body)
                assert answer.status_code == 400
                assert problem in answer.json()["error"]["message"]
            assert (await client.get("/v1/about/config.json")).status_code == 404

    run(work())


def test_comparisons_beyond_those_that_may_wait_are_refused_by_their_number(
    digits: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()
    opened = SideBySide._engine_for

    def slow(self: SideBySide, bundle: Bundle, other: str) -> Engine:
        assert let_go.wait(FOREVER_S)
        return opened(self, bundle, other)

    monkeypatch.setattr(SideBySide, "_engine_for", slow)

    async def work() -> None:
        async with client_of_demo(digits) as client:
            tasks = [
                asyncio.create_task(client.post("/v1/compare", json={"other": "torch-fp32", "seeds": [7]})) for _ in range(5)
            ]
            refused = (await next(asyncio.as_completed(tasks))).json()["error"]
            let_go.set()
            answers = [await task for task in tasks]
            assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429]
            assert refused["message"] == "4 comparisons are running or waiting already; try again in 2 s"
            again = next(answer for answer in answers if answer.status_code == 429)
            assert again.headers["retry-after"] == "2"

    run(work())


def test_the_card_is_told_without_its_front_matter(digits: Bundle) -> None:
    async def work() -> None:
        async with client_of_demo(digits) as client:
            about = (await client.get("/v1/about")).json()
            assert about["card"].lstrip().startswith("# digits")
            assert "## Scores" in about["card"]
            assert (about["pictures"], about["needs_key"]) == (["samples.png"], False)
            assert about["teacher"] == {"steps": 18, "evaluations": 35, "at_hand": False}
            picture = await client.get("/v1/about/samples.png")
            assert picture.content == (digits.path / "samples.png").read_bytes()

    run(work())
