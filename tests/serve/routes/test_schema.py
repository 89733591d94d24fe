"""What may be asked for, what is refused in which words, and what the answers hold."""

import base64
import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uni_instruct.errors import RequestError
from uni_instruct.images import grid
from uni_instruct.noise import parse_seeds, random_class_ids
from uni_instruct.serve.errors import error_body
from uni_instruct.serve.routes.responses import encode_job, job_headers, media_type, seed_ranges
from uni_instruct.serve.routes.schema import Job, parse_request, resolve
from uni_instruct.spec import ModelSpec

DIGITS = ModelSpec(name="digits", noise_shape=(1, 8, 8), num_classes=3, class_names=("zero", "one", "two"))
PLAIN = ModelSpec(name="plain", noise_shape=(3, 4, 4))


def job(body: dict[str, Any], spec: ModelSpec = DIGITS, limit: int = 256) -> Job:
    return resolve(parse_request(json.dumps(body).encode()), spec, limit)


def pictures(count: int, spec: ModelSpec = DIGITS) -> np.ndarray:
    channels, height, width = spec.image_shape
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


WRONG = [
    (b"{", "the body is not JSON; send an object"),
    (b"\xff\xfe", "the body is not JSON"),
    (b"[1]", "the body is [1], not an object"),
    (b'{"seds": [1]}', "field 'seds' is unknown; the fields are model, seeds, num_images,"),
    (b'{"": [1]}', "field '' is unknown; the fields are model, seeds, num_images,"),
    (b'{"seeds": 7}', "seeds is 7; give a list of integers"),
    (b'{"seeds": ["a"]}', "seeds[0] is 'a'; give a list of integers"),
    (b'{"seeds": [1.5]}', "seeds[0] is 1.5"),
    (b'{"seeds": [true]}', "seeds[0] is True"),
    (b'{"seeds": [-1]}', "seed -1 is not an integer in [0, 2**63)"),
    (b'{"seeds": [9223372036854775808]}', "seed 9223372036854775808 is not an integer in [0, 2**63)"),
    (b'{"seeds": []}', "0 images were asked for; ask for 1 to 256 in one request"),
    (b'{"num_images": 0}', "0 images were asked for"),
    (b'{"num_images": -3}', "-3 images were asked for"),
    (b'{"num_images": 257}', "257 images were asked for"),
    (b'{"num_images": 1000000000000000000000}', "1000000000000000000000 images were asked for"),
    (b'{"num_images": "4"}', "num_images is '4'; give an integer"),
    (b'{"seeds": [1], "num_images": 1}', "both seeds and num_images are given; give one of them"),
    (b'{"class_ids": [3]}', "class 3 is outside 0..2"),
    (b'{"class_ids": [-1]}', "class -1 is outside 0..2"),
    (b'{"classes": ["three"]}', "class three is neither a class name nor an id in 0..2"),
    (b'{"class_ids": []}', "the list of classes is empty"),
    (b'{"class_ids": [1], "classes": ["one"]}', "both class_ids and classes are given"),
    (b'{"seeds": [1, 2, 3], "class_ids": [1, 2]}', "2 classes were given for 3 seeds"),
    (b'{"format": "bmp"}', "format is 'bmp'; choose one of png, jpeg, webp, npz, zip, json"),
    (b'{"num_images": 4, "format": "jpeg"}', "4 images do not fit into one jpeg file"),
    (b'{"num_images": 4, "format": "npz", "grid": true}', "a grid is a picture, and npz is not a picture format"),
    (b'{"grid": 1}', "grid is 1; give true or false"),
]


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_a_wrong_request_is_refused_with_problem_value_and_remedy(body: bytes, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        resolve(parse_request(body), DIGITS, 256)
    assert message in str(refused.value)
    assert refused.value.http_status == 400
    assert refused.value.remedy


def test_a_class_for_an_unconditional_generator_is_refused() -> None:
    with pytest.raises(RequestError, match="generator 'plain' has no classes"):
        job({"class_ids": [0]}, PLAIN)


def test_a_huge_value_is_not_repeated_in_full() -> None:
    with pytest.raises(RequestError) as refused:
        parse_request(json.dumps({"format": "x" * 100_000}).encode())
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "body",
    [
        b'{"seeds": [' + b'"",' * 300_000 + b"1]}",
        b'{"classes": [' + b"[]," * 300_000 + b"1]}",
        b"{" + b",".join(b'"f%d": 1' % number for number in range(50_000)) + b"}",
        b'{"format": "' + b"x" * 1_000_000 + b'"}',
        b'{"seeds": ' + b"9" * 1_000_000 + b"}",
        b"[" * 1_000_000,
        b'{"' + b"f" * 1_000_000 + b'": 1}',
    ],
    ids=["items", "lists", "fields", "text", "digits", "depth", "name"],
)
def test_of_a_million_wrong_things_one_is_named_briefly(body: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        parse_request(body)
    assert len(str(refused.value)) < 300


def test_a_long_name_of_a_class_is_not_repeated_in_full() -> None:
    with pytest.raises(RequestError) as refused:
        job({"classes": ["x" * 50_000]})
    message = str(error_body(refused.value)["error"]["message"])
    assert len(message) < 500
    assert message.endswith(refused.value.remedy)


def test_without_seeds_they_are_drawn_and_differ() -> None:
    first, second = job({}), job({"num_images": 5})
    assert len(first.seeds) == 1
    assert second.seeds == list(range(second.seeds[0], second.seeds[0] + 5))
    assert first.seeds[0] not in second.seeds
    assert max(second.seeds) < 2**53  # exact in JavaScript, too


def test_classes_come_by_id_by_name_or_from_the_seed() -> None:
    seeds = [4, 5, 6]
    np.testing.assert_array_equal(job({"seeds": seeds, "class_ids": [2]}).class_ids, [2, 2, 2])
    np.testing.assert_array_equal(job({"seeds": seeds, "classes": ["two", "one", "zero"]}).class_ids, [2, 1, 0])
    np.testing.assert_array_equal(job({"seeds": seeds}).class_ids, random_class_ids(seeds, 3))
    assert job({"seeds": seeds}, PLAIN).class_ids is None


@pytest.mark.parametrize(
    ("body", "format"), [({}, "png"), ({"num_images": 2}, "json"), ({"num_images": 2, "grid": True}, "png")]
)
def test_the_format_follows_the_number_of_images(body: dict[str, Any], format: str) -> None:
    assert job(body).format == format


@given(st.lists(st.integers(0, 30) | st.integers(0, 2**63 - 1), min_size=1, max_size=40))
def test_the_seeds_header_reads_back(seeds: list[int]) -> None:
    assert parse_seeds(seed_ranges(seeds)) == seeds


def test_headers_stay_short() -> None:
    seeds = list(range(0, 2000, 2))
    headers = job_headers(Job(seeds, np.zeros(1000, dtype=np.int64), "npz", grid=False))
    assert "X-Seeds" not in headers
    assert all(len(value) <= 2048 for value in headers.values())


@pytest.mark.parametrize("spec", [DIGITS, PLAIN])
@pytest.mark.parametrize("format", ["png", "webp"])
def test_one_image_keeps_its_pixels(spec: ModelSpec, format: str) -> None:
    images = pictures(1, spec)
    asked = job({"seeds": [1], "format": format}, spec)
    body = encode_job(asked, images, spec)
    assert media_type(asked) == f"image/{format}"
    picture = Image.open(io.BytesIO(body))
    assert picture.format == format.upper()
    pixels = np.asarray(picture.convert("L" if spec is DIGITS else "RGB")).reshape(images[0].shape)
    np.testing.assert_array_equal(pixels, images[0])


def test_a_grid_holds_all_images() -> None:
    images = pictures(5)
    body = encode_job(job({"num_images": 5, "grid": True}), images, DIGITS)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(body))), grid(images)[:, :, 0])


def test_npz_holds_images_seeds_and_classes() -> None:
    images = pictures(3)
    body = encode_job(job({"seeds": [7, 9, 2**63 - 1], "classes": ["one"], "format": "npz"}), images, DIGITS)
    arrays = np.load(io.BytesIO(body))
    np.testing.assert_array_equal(arrays["arr_0"], images)
    assert arrays["seeds"].tolist() == [7, 9, 2**63 - 1]
    assert arrays["class_ids"].tolist() == [1, 1, 1]
    plain = encode_job(job({"seeds": [7], "format": "npz"}, PLAIN), pictures(1, PLAIN), PLAIN)
    assert set(np.load(io.BytesIO(plain))) == {"arr_0", "seeds"}


def test_zip_holds_pngs_in_order_and_the_labels_of_edm() -> None:
    images = pictures(3)
    body = encode_job(job({"seeds": [7, 7, 3], "class_ids": [0, 1, 2], "format": "zip"}), images, DIGITS)
    archive = zipfile.ZipFile(io.BytesIO(body))
    labels = json.loads(archive.read("dataset.json"))["labels"]
    assert [name for name, _ in labels] == sorted(name for name in archive.namelist() if name.endswith(".png"))
    assert [label for _, label in labels] == [0, 1, 2]
    for (name, _), image in zip(labels, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(archive.open(name))), image[:, :, 0])


def test_json_names_seed_and_class_of_each_image() -> None:
    images = pictures(2)
    body = encode_job(job({"seeds": [7, 8], "class_ids": [2, 0]}), images, DIGITS)
    entries = json.loads(body)["images"]
    assert [(e["seed"], e["class_id"], e["class_name"]) for e in entries] == [(7, 2, "two"), (8, 0, "zero")]
    for entry, image in zip(entries, images, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(entry["b64_png"])))
        np.testing.assert_array_equal(np.asarray(picture), image[:, :, 0])
