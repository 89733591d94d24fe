# ruff: noqa: E501
"""Wrong requests to a server of two models, and how the remedy in each answer is followed."""

import gzip
import json
import re
from collections.abc import Callable
from typing import NamedTuple

from httpx import Client

from builders.remedies import first_choice

# Method, path, and a body: fields as JSON, or bytes with their encoding.
Ask = tuple[str, str, dict[str, object] | tuple[bytes, str] | None]


class Request(NamedTuple):
    """Where its message is made, a wrong request, and one that follows the remedy; the client may ask for more."""

    path: str
    message: str
    wrong: Ask
    follow: Callable[[str, Client], Ask]


def found(pattern: str, remedy: str) -> str:
    match = re.search(pattern, remedy)
    assert match, remedy
    return match[1]


def fields_of(url: str) -> Callable[..., Callable[[str, Callable[[str], dict[str, object]]], Callable[[str, Client], Ask]]]:
    """For a route: fields that stay, those of a wrong call, and what follows the remedy in their place."""
    return lambda **fields: lambda said, change: lambda remedy, _: ("POST", url, {**fields, **_checked(remedy, said, change)})


def _checked(remedy: str, said: str, change: Callable[[str], dict[str, object]]) -> dict[str, object]:
    assert said in remedy, remedy
    return change(remedy)


def image(query: str) -> Ask:
    return "GET", f"/v1/images/tiny/7.png{query}", None


def many(count: int) -> bytes:
    return gzip.compress(json.dumps({"seeds": list(range(10**18, 10**18 + count))}).encode())


def picture_of(about: dict[str, list[str]]) -> str:
    """The address of the first picture that /v1/about names."""
    return f"/v1/about/{about['pictures'][0]}"


GENERATE, WALK, IMAGES, COMPARE = "/v1/generate", "/v1/walk", "/v1/images/generations", "/v1/compare"
A, B, IMAGE, OPENAI, P, W = (
    "serve/app.py",
    "serve/http/body.py",
    "serve/routes/image_address.py",
    "serve/routes/openai_images.py",
    "serve/routes/picture.py",
    "serve/routes/walk.py",
)
walk, images = fields_of(WALK), fields_of(IMAGES)
REQUESTS = [
    Request(A, "(_http_exception)", ("DELETE", GENERATE, None), lambda remedy, _: (found(r"use (\w+)", remedy), GENERATE, {})),
    Request(A, "there is no {}", ("GET", "/v1/nothing", None), lambda remedy, _: ("GET", found(r"(/\w+) lists", remedy), None)),
    Request("serve/models/registry.py", "(get)", ("GET", "/v1/models/nothing", None),
            lambda remedy, _: ("GET", f"/v1/models/{first_choice(remedy)}", None)),
    Request(B, "content encoding {} is not supported", ("POST", GENERATE, (b"{}", "br")),
            lambda remedy, _: ("POST", GENERATE, (gzip.compress(b"{}"), found(r"or with (\w+)", remedy)))),
    Request(B, "the body is not valid gzip", ("POST", GENERATE, (b"{}", "gzip")),
            lambda remedy, _: ("POST", GENERATE, {} if "omit the header Content-Encoding" in remedy else None)),
    Request(B, "the body is larger than", ("POST", GENERATE, (many(250), "gzip")),
            lambda remedy, _: ("POST", GENERATE, (many(20 if "ask for fewer" in remedy else 250), "gzip"))),
    Request(IMAGE, "there is no image", ("GET", "/v1/images/tiny/7.tga", None),
            lambda remedy, _: ("GET", f"/v1/images/tiny/{found(r': (7.png)', remedy)}", None)),
    Request(IMAGE, "parameter {} is unknown", image("?klass=1"), lambda remedy, _: image(f"?{found(r'parameters are (.*?) ', remedy)}=1")),
    Request(IMAGE, "parameter {} is given twice", image("?class=1&class=1"),
            lambda remedy, _: image("?class=1" if "once" in remedy else "")),
    Request(IMAGE, "weights {} are not {} or more", image("?weights=latest"),
            lambda remedy, client: image(f"?weights={client.get(found(r'in (/.*)', remedy)).json()['weights_sha256'][: int(found(r'first (.)', remedy))]}")),
    Request(IMAGE, "the weights {} are not served", image("?weights=00000000"),
            lambda remedy, _: image(f"?weights={found(r'begin with (.*)', remedy)}")),
    Request(P, "size {} is not available", image("?size=9x9"), lambda remedy, _: image(f"?size={found(r'give (.*?) or', remedy)}")),
    Request(P, "output_compression is {}", ("POST", IMAGES, {"output_format": "webp", "output_compression": 101}),
            images(output_format="webp")("to", lambda remedy: {"output_compression": int(found(r"to (\d+)", remedy))})),
    Request(P, "png is lossless", ("POST", IMAGES, {"output_compression": 50}),
            images(output_compression=50)("output_format", lambda remedy: {"output_format": found(r"output_format (\w+)", remedy)})),
    Request(OPENAI, "{} cannot be combined with", ("POST", IMAGES, {"response_format": "url", "stream": True}),
            images(stream=True)("choose", lambda remedy: {"response_format": found('format "(.*?)"', remedy)})),
    Request(OPENAI, "{} has no classes", ("POST", IMAGES, {"model": "plain", "prompt": "cat"}),
            images(model="plain")("prompt empty", lambda _: {"prompt": ""})),
    Request(OPENAI, "{} has no class {}", ("POST", IMAGES, {"prompt": "a cat"}),
            images()("a class", lambda remedy: {"prompt": found(r": ([^,]+),", remedy)})),
    Request(OPENAI, "{} images were asked for", ("POST", IMAGES, {"n": 0}), images()("1 to", lambda remedy: {"n": int(found(r"to (\d+)", remedy))})),
    Request(OPENAI, "seed {} of {} images", ("POST", IMAGES, {"n": 2, "seed": 2**63 - 1}),
            images(n=2)("from 0 to", lambda remedy: {"seed": 2**63 - int(found(r"63 - (\d)", remedy))})),
    Request(OPENAI, "{} images of {} are too many", ("POST", IMAGES, {"n": 5, "size": "2048x2048"}),
            images(n=5)("or for", lambda remedy: {"size": found(r"or for (.*)", remedy)})),
    Request(W, "the list of classes is empty", ("POST", WALK, {"seeds": [1, 2], "classes": []}), walk(seeds=[1, 2])("leave it out", lambda _: {})),
    Request(W, "the walk has {} stops", ("POST", WALK, {"seeds": []}),
            walk()("1 to", lambda remedy: {"seeds": list(range(int(found(r"to (\d+)", remedy))))})),
    Request(W, "both {} and {} are given", ("POST", WALK, {"seeds": [1, 2], "positions": [0.5], "frames": 3}),
            walk(seeds=[1, 2])("one of them", lambda _: {"frames": 3})),
    Request(W, "count is {}", ("POST", WALK, {"seeds": [1], "count": 0}),
            walk(seeds=[1])("at least", lambda remedy: {"count": int(found(r"at least (\d)", remedy))})),
    Request(W, "{} {} of {} images", ("POST", WALK, {"seeds": [1, 2], "frames": 10**6}),
            walk(seeds=[1, 2])("1 to", lambda remedy: {"frames": int(found(r"to (\d+)", remedy))})),
    Request(W, "{} cannot be animated", ("POST", WALK, {"seeds": [1, 2], "frames": 2, "animated": True}),
            walk(seeds=[1, 2], frames=2, animated=True)("give", lambda remedy: json.loads(f"{{{found('give (.*)', remedy)}}}"))),
    Request(W, "the animation would be", ("POST", WALK, {"seeds": [1], "count": 16, "scale": 64, "animated": True, "format": "webp"}),
            walk(seeds=[1], count=16, animated=True, format="webp")("scale", lambda remedy: {"scale": int(found(r"most (\d+)", remedy))})),
]  # fmt: skip

# What the demo asks, of a server that has one.
DEMO = [
    Request("serve/demo/compare.py", "there is no '{}' to compare", ("POST", COMPARE, {"other": "abacus", "seeds": [7]}),
            fields_of(COMPARE)(seeds=[7])("choose one of", lambda remedy: {"other": first_choice(remedy)})),
    Request("serve/demo/compare.py", "{} images were asked for", ("POST", COMPARE, {"other": "torch-fp32", "seeds": [7] * 17}),
            fields_of(COMPARE)(other="torch-fp32")("compare 1 to", lambda remedy: {"seeds": [7] * int(found(r"to (\d+)", remedy))})),
    Request("serve/demo/routes.py", "there is no picture", ("GET", "/v1/about/config.json", None),
            lambda remedy, client: ("GET", picture_of(client.get(found(r"GET (/\S+)", remedy)).json()), None)),
    Request("serve/demo/mount.py", "there is no /ui/", ("POST", "/ui/nothing", None), lambda remedy, _: ("GET", found(r"open (/\w+)", remedy), None)),
]  # fmt: skip
