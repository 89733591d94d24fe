"""OpenAI's own client, the image route and what both share, on a real engine behind real HTTP."""

import asyncio
import base64
import gzip
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from PIL import Image

from builders.bundles import random_bundle
from builders.servers import free_port
from builders.serving import app_of
from uni_instruct.bundle import Bundle
from uni_instruct.engine import open_engine
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.serve.demo.mount import DemoMount

ODD = 2**60 + 1  # no number in JavaScript
# Not positive_data_acceptance: which classes there are, and what goes together, no schema says.
HELD_BY_SCHEMATHESIS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return random_bundle(tmp_path_factory.mktemp("plain") / "plain", seed=9, num_classes=0, image_shape=(3, 8, 8))


@pytest.fixture(scope="module")
def url(tiny_bundle: Bundle, plain: Bundle) -> Iterator[str]:
    """Two models behind uvicorn, in a thread of this process, with what the demo asks; its page would take long to import."""

    async def without_gradio(self: DemoMount) -> None:
        pass

    port = free_port()
    settings = {"max_body_bytes": 20_000, "request_images": 32, "max_batch": 1, "ui": True}
    app = app_of(f"grey={tiny_bundle.path}", f"colour={plain.path}", **settings)
    patch = pytest.MonkeyPatch()
    patch.setattr(DemoMount, "start", without_gradio)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    address = f"http://127.0.0.1:{port}"
    while not server.started or httpx.get(f"{address}/readyz").status_code != 200:
        threading.Event().wait(0.05)
    yield address
    server.should_exit = True
    thread.join()
    patch.undo()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none is needed", max_retries=0)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def truth(bundle: Bundle, seeds: list[int], label: int | str | None = None) -> np.ndarray:
    classes = None if label is None else [label]
    images = generate_images(open_engine(bundle, "torch"), seeds, resolve_class_ids(bundle.spec, seeds, classes), batch=1)
    return images[..., 0] if images.shape[3] == 1 else images


def decoded(image: object) -> np.ndarray:
    return pixels(base64.b64decode(str(getattr(image, "b64_json", ""))))


def test_openais_client_generates_what_generate_makes(client: openai.OpenAI, tiny_bundle: Bundle, plain: Bundle) -> None:
    answer = client.images.generate(model="grey", prompt="3", n=3, extra_body={"seed": 7})
    assert answer.data is not None
    for image, expected, seed in zip(answer.data, truth(tiny_bundle, [7, 8, 9], 3), (7, 8, 9), strict=True):
        np.testing.assert_array_equal(decoded(image), expected)
        assert image.model_extra is not None
        assert (image.model_extra["seed"], image.model_extra["class_name"], image.revised_prompt) == (seed, "3", "3")
    assert (answer.size, answer.output_format) == ("8x8", "png")
    drawn = client.images.generate(model="colour", prompt="").data
    assert drawn is not None
    assert drawn[0].model_extra is not None
    np.testing.assert_array_equal(decoded(drawn[0]), truth(plain, [drawn[0].model_extra["seed"]])[0])


def test_formats_sizes_and_quality(client: openai.OpenAI, tiny_bundle: Bundle) -> None:
    sizes = []
    for compression in (5, 95):
        answer = client.images.generate(
            prompt="3", size="256x256", output_format="jpeg", output_compression=compression, extra_body={"seed": 7}
        )
        assert answer.data is not None
        data = base64.b64decode(str(answer.data[0].b64_json))
        picture = Image.open(io.BytesIO(data))
        assert (picture.format, picture.size) == ("JPEG", (256, 256))
        sizes.append(len(data))
    assert sizes[0] < sizes[1]
    enlarged = client.images.generate(prompt="3", size="1024x1024", output_format="webp", extra_body={"seed": 7}).data
    assert enlarged is not None
    crisp = truth(tiny_bundle, [7], 3)[0].repeat(128, axis=0).repeat(128, axis=1)
    np.testing.assert_array_equal(decoded(enlarged[0])[..., 0], crisp)


def test_a_stream_has_an_event_an_image(client: openai.OpenAI, tiny_bundle: Bundle) -> None:
    events = list(client.images.generate(prompt="3", n=3, stream=True, extra_body={"seed": 7}))
    assert [event.type for event in events] == ["image_generation.completed"] * 3
    for event, expected in zip(events, truth(tiny_bundle, [7, 8, 9], "3"), strict=True):
        np.testing.assert_array_equal(decoded(event), expected)
    with client.images.with_streaming_response.generate(prompt="3", stream=True) as answer:
        assert answer.headers["x-model"] == "grey"


def test_a_url_leads_to_the_same_image(client: openai.OpenAI, tiny_bundle: Bundle) -> None:
    answer = client.images.generate(prompt="3", n=2, size="16x16", response_format="url", extra_body={"seed": ODD}).data
    assert answer is not None
    for image, expected in zip(answer, truth(tiny_bundle, [ODD, ODD + 1], 3), strict=True):
        fetched = pixels(httpx.get(str(image.url)).raise_for_status().content)
        np.testing.assert_array_equal(fetched, expected.repeat(2, axis=0).repeat(2, axis=1))


def test_openais_client_lists_and_retrieves_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["grey", "colour"]
    assert client.models.retrieve("colour").owned_by == "uni-instruct"
    with pytest.raises(openai.NotFoundError, match="no model 'dall-e-3' is served; choose one of grey, colour"):
        client.models.retrieve("dall-e-3")


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        (
            {"prompt": "a cat on the moon"},
            400,
            "prompt",
            "not a text-to-image model; the prompt is a class, or empty for random",
        ),
        ({"prompt": "x", "model": "colour"}, 400, "prompt", "has no classes and is not a text-to-image model"),
        ({"model": "gpt-image-1"}, 404, "model", "no model 'gpt-image-1' is served"),
        ({"n": 0}, 400, "n", "ask for 1 to 32"),
        ({"n": 33}, 400, "n", "ask for 1 to 32"),
        ({"n": 32, "size": "1024x1024"}, 400, "size", "32 images of 1024x1024 are too many"),
        ({"size": "9x9"}, 400, "size", "give 8x8 or a whole multiple of it, up to 2048 pixels a side"),
        ({"size": "8x16"}, 400, "size", "size '8x16' is not available; leave it out, or"),
        # A multiple, but too large.
        ({"size": "4096x4096"}, 400, "size", "size '4096x4096' is not available; leave it out, or"),
        ({"seed": -1}, 400, "seed", "not in [0, 2**63); give an integer from 0 to 2**63 - 1"),
        ({"seed": "x"}, 400, "seed", "seed is 'x'; give an integer"),
        ({"seed": str(2**63 - 1), "n": 2}, 400, "seed", "not in [0, 2**63); give an integer from 0 to 2**63 - 2"),
        ({"response_format": "url", "stream": True}, 400, "stream", "cannot be combined with the response_format url"),
        ({"output_compression": 50}, 400, "output_compression", "png is lossless"),
        ({"output_compression": 101, "output_format": "webp"}, 400, "output_compression", "give an integer from 0 to 100"),
        ({"background": "transparent"}, 400, "background", "give opaque"),
        ({"promt": "3"}, 400, "promt", "field 'promt' is unknown"),
    ],
)
def test_what_is_refused(url: str, body: dict[str, object], status: int, param: str, message: str) -> None:
    answer = httpx.post(f"{url}/v1/images/generations", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert message in error["message"]


def test_an_address_is_an_image_that_caches_keep(url: str, tiny_bundle: Bundle) -> None:
    first = httpx.get(f"{url}/v1/images/grey/7.png", params={"class": "3"})
    np.testing.assert_array_equal(pixels(first.content), truth(tiny_bundle, [7], 3)[0])
    tag = first.headers["etag"]
    assert tiny_bundle.weights_sha256[:16] in tag
    assert first.headers["cache-control"] == "public, max-age=86400, immutable"
    for held in (tag, f'"other", W/{tag}', "*"):
        again = httpx.get(f"{url}/v1/images/grey/7.png?class=3", headers={"If-None-Match": held})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert httpx.get(f"{url}/v1/images/grey/7.png?class=3", headers={"If-None-Match": '"other"'}).status_code == 200
    lines = [("If-None-Match", '"other"'), ("If-None-Match", tag)]
    assert httpx.get(f"{url}/v1/images/grey/7.png?class=3", headers=lines).status_code == 304
    pinned = httpx.get(f"{url}/v1/images/grey/{ODD}.webp", params={"weights": tiny_bundle.weights_sha256[:12]})
    assert pinned.headers["cache-control"] == "public, max-age=31536000, immutable"
    np.testing.assert_array_equal(pixels(pinned.content)[..., 0], truth(tiny_bundle, [ODD])[0])
    assert httpx.get(f"{url}/v1/images/grey/7.jpg").headers["content-type"] == "image/jpeg"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("grey/7.bmp", 404),
        ("grey/-1.png", 404),
        (f"grey/{2**63}.png", 404),
        ("grey/07.png", 404),
        ("grey/1\N{ARABIC-INDIC DIGIT THREE}.png", 404),
        ("grey/7.png?size=1\N{ARABIC-INDIC DIGIT SIX}x1\N{ARABIC-INDIC DIGIT SIX}", 400),
        ("red/7.png", 404),
        ("grey/7.png?weights=00000000", 404),
        ("grey/7.png?weights=zz", 400),
        ("grey/7.png?class=dog", 400),
        ("colour/7.png?class=1", 400),
        ("grey/7.png?classes=1", 400),
        ("grey/7.png?class=1&class=2", 400),
        ("grey/7.png?size=7x7", 400),
    ],
)
def test_what_is_no_address(url: str, path: str, status: int) -> None:
    answer = httpx.get(f"{url}/v1/images/{path}")
    assert answer.status_code == status
    assert answer.json()["error"]["remedy"]
    if "class=" in path:  # not as the field of other routes is called
        assert answer.json()["error"]["param"] == "class"


def test_seeds_travel_as_strings(url: str) -> None:
    body = {"seeds": [str(ODD), 8], "format": "json"}
    images = httpx.post(f"{url}/v1/generate", json=body).json()["images"]
    assert [image["seed"] for image in images] == [str(ODD), "8"]
    integers = httpx.post(f"{url}/v1/generate", json=body | {"seed_format": "integer"}).json()["images"]
    assert [image["seed"] for image in integers] == [ODD, 8]
    assert [image["b64_png"] for image in integers] == [image["b64_png"] for image in images]
    drawn = httpx.post(f"{url}/v1/generate", json={"format": "json", "seed_format": "string"}).json()["images"]
    assert drawn[0]["seed"].isdecimal()
    answer = httpx.post(f"{url}/v1/images/generations", json={"seed": str(ODD)}).json()
    assert answer["data"][0]["seed"] == str(ODD)


def test_bodies_may_have_a_byte_order_mark_or_be_gzipped(url: str) -> None:
    body = json.dumps({"seeds": [7]}).encode()
    plain = httpx.post(f"{url}/v1/generate", content=body).content
    halves = gzip.compress(body[:5]) + gzip.compress(body[5:])
    for content in (gzip.compress(body), gzip.compress(b"\xef\xbb\xbf" + body), halves):
        sent = httpx.post(f"{url}/v1/generate", content=content, headers={"Content-Encoding": "gzip"})
        assert (sent.status_code, sent.content) == (200, plain)
    assert httpx.post(f"{url}/v1/generate", content=b"\xef\xbb\xbf" + body).content == plain
    for content, encoding, status in (
        (gzip.compress(b" " * 50_000_000), "gzip", 413),
        (gzip.compress(body)[:-9], "gzip", 400),
        (gzip.compress(body) + b"rest", "gzip", 400),
        (body, "gzip", 400),
        (body, "br", 415),
    ):
        answer = httpx.post(f"{url}/v1/generate", content=content[:20_000], headers={"Content-Encoding": encoding})
        assert answer.status_code == status
        assert answer.json()["error"]["remedy"]


def test_the_request_id_comes_back(url: str) -> None:
    for path in ("/livez", "/nowhere", "/v1/spec"):
        assert httpx.get(f"{url}{path}", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {httpx.get(f"{url}/livez", headers={"X-Request-ID": odd}).headers["x-request-id"] for odd in ("", "a b", "x" * 129)}
    assert len(made) == 3
    assert all(len(request_id) == 32 for request_id in made)


def test_the_description_is_true_to_every_route(url: str, tmp_path: Path) -> None:
    """Schemathesis makes requests of the description, right ones and wrong ones, and holds the answers against it."""
    import schemathesis
    from schemathesis import checks

    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    described = {operation.ok().label for operation in schema.get_all_operations()}
    assert {"POST /v1/generate", "POST /v1/images/generations", "GET /v1/images/{model}/{file}", "GET /v1/spec"} <= described
    assert {"GET /v1/about", "GET /v1/about/{picture}", "POST /v1/compare"} <= described
    checks.load_all_checks()
    held = checks.CHECKS.get_by_names(list(HELD_BY_SCHEMATHESIS))
    # /generate is BentoML's: test_process.py asks it where BentoML runs.
    for operation in schema.exclude(path="/generate").get_all_operations():

        @settings(max_examples=8, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.ok().as_strategy())
        def try_(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=held)

        try_()
