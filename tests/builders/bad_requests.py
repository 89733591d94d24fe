"""Requests that no client should send: wrong fields, damaged bodies, strange paths, broken HTTP. The same for the same seed."""

import gzip
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# Route -> a good body, whose fields are then spoiled.
_GOOD: dict[str, dict[str, object]] = {
    "/v1/generate": {"seeds": [7, 8], "class_ids": [3], "format": "zip", "grid": False, "seed_format": "string"},
    "/v1/images/generations": {"prompt": "3", "n": 2, "size": "auto", "seed": 7, "output_format": "png", "stream": False},
    "/v1/walk": {"seeds": [3, 58], "positions": [0.5], "count": 2, "format": "png"},
    "/v1/compare": {"other": "teacher", "seeds": [7], "class_ids": [3]},
    "/generate": {"seeds": [7], "class_ids": [3]},
}
_WORDS = ("", "\x00", "é\ud800", "../../etc/passwd", "%s%n", "1e309", "NaN", "true", "' OR 1=1", "\r\nX-Forged: 1", "x" * 5000)
_NUMBERS = (-1, 0, 1, 257, 2**31, 2**53, 2**63, 10**400, -0.0, 0.5, 1e308, float("nan"), float("inf"))
_PATHS = (
    *("/", "//", "/../..", "/%00", "/v1", "/v1/generate/", "/V1/GENERATE", "/v1/images/digits/7.gif", "/v1/images/x/7.png"),
    *("/v1/images/digits/-1.png", "/v1/images/digits/99999999999999999999.png", "/v1/images/digits/7.png?class=dog&class=1"),
    *(
        "/v1/images/digits/7.png?size=0x0",
        "/v1/models/%2e%2e",
        "/v1/spec?model=%ff",
        "/v1/about?model=x",
        "/ui/gradio_api/upload",
    ),
    *("/static_content/../../pyproject.toml", "/static_content/%2e%2e%2f", "/" + "a" * 9000, "/v1/generate?" + "a=1&" * 2000),
)
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW", "post", "P" * 300)
_RAW = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\r\n\r\n\r\n",
    b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n{}",
    b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 9\r\n\r\n{}",
    b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n",
    b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost x\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Request-ID: \xff\x00\r\n\r\n",
)


@dataclass(frozen=True)
class BadRequest:
    """Bytes for a connection of its own, and what kind of wrong they are. raw: not even HTTP, so it may just be closed."""

    kind: str
    data: bytes
    raw: bool = False


def bad_requests(count: int, seed: int, headers: Mapping[str, str] | None = None) -> Iterator[BadRequest]:
    """So many; the headers (a key, as it may be) are sent with all that are HTTP."""
    rng = random.Random(seed)
    for _ in range(count):
        kind, make = rng.choice(_KINDS)
        if kind == "raw":
            yield BadRequest(kind, _raw(rng), raw=True)
        else:
            method, path, body, more = make(rng)
            yield BadRequest(kind, _http(method, path, body, {**(headers or {}), **more}))


_Parts = tuple[str, str, bytes, dict[str, str]]


def _fields(rng: random.Random) -> _Parts:
    """One field or several of another type, value or length, or one too many."""
    path, good = rng.choice(list(_GOOD.items()))
    body = dict(good)
    for name in rng.sample(list(body), rng.randint(1, 2)):
        body[name] = _value(rng)
    if rng.random() < 0.2:
        body[rng.choice(_WORDS)] = _value(rng)
    if rng.random() < 0.2:
        body["model"] = _value(rng)
    return "POST", path, json.dumps(body).encode(), {}


def _value(rng: random.Random, depth: int = 0) -> object:
    choices: Sequence[Callable[[], object]] = (
        lambda: None,
        lambda: rng.choice(_WORDS),
        lambda: rng.choice(_NUMBERS),
        lambda: [_value(rng, depth + 1)] * rng.choice((0, 1, 3, 300)) if depth < 2 else [],
        lambda: {rng.choice(_WORDS): _value(rng, depth + 1)} if depth < 2 else {},
        lambda: [rng.choice(_NUMBERS) for _ in range(rng.choice((1, 2, 300)))],
    )
    return rng.choice(choices)()


def _damaged(rng: random.Random) -> _Parts:
    """JSON that is cut off, has a byte changed, is nested deeply, or is none at all."""
    path, good = rng.choice(list(_GOOD.items()))
    data = bytearray(json.dumps(good).encode())
    how = rng.randrange(5)
    if how == 0:
        data = data[: rng.randrange(len(data))]
    elif how == 1:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif how == 2:
        data = bytearray(b'{"seeds":' * 3000 + b"[" * 20_000)
    elif how == 3:
        data = bytearray(rng.randbytes(rng.randrange(4000)))
    else:
        data = bytearray(b'{"seeds": [' + b'"",' * 20_000 + b"1]}")
    return "POST", path, bytes(data), {}


def _packed(rng: random.Random) -> _Parts:
    """A body in an encoding that is not what it says, or that inflates to far more."""
    body = rng.choice((b"{}", gzip.compress(b" " * 10_000_000), gzip.compress(b'{"seeds": [7]}')[:-5], b"\x1f\x8b" + bytes(50)))
    encoding = rng.choice(("gzip", "br", "gzip, gzip", "identity;q=0", "x" * 500, "deflate"))
    kind = rng.choice(("application/json", "text/html; charset=\\", "multipart/form-data", ""))
    return "POST", rng.choice(list(_GOOD)), body, {"Content-Encoding": encoding, "Content-Type": kind}


def _addressed(rng: random.Random) -> _Parts:
    """Another path or another method than there is."""
    return rng.choice(_METHODS), rng.choice((*_PATHS, *_GOOD, "/livez", "/metrics")), b"", {}


def _told(rng: random.Random) -> _Parts:
    """Headers that lie or make no sense."""
    more = {
        "Range": rng.choice(("bytes=9999999-", "bytes=-1,-2", "x")),
        "Expect": rng.choice(("100-continue", "200-ok")),
        "If-None-Match": rng.choice(('W/"', "*" * 4000)),
        "Authorization": rng.choice(("Basic \xff\xfe", "Bearer " + "k" * 6000, "Basic " + "A" * 5000)),
        "Upgrade": "websocket",
        "X-Forwarded-For": rng.choice(("999.999.999.999", "a" * 3000)),
        "Origin": rng.choice(("null", "http://" + "o" * 3000)),
        "Accept": "image/" + "x" * 2000,
    }
    name = rng.choice(list(more))
    return rng.choice(("GET", "POST")), rng.choice((*_GOOD, "/v1/models", "/ui")), b"{", {name: more[name]}


def _large(rng: random.Random) -> _Parts:
    """More bytes than are read."""
    return "POST", rng.choice(list(_GOOD)), b" " * rng.choice((70_000, 300_000)), {}


def _raw(rng: random.Random) -> bytes:
    return rng.choice(_RAW) if rng.random() < 0.8 else rng.randbytes(rng.randint(1, 500)) + b"\r\n\r\n"


def _http(method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode("latin-1", errors="replace") + b"\r\n\r\n" + body


_KINDS: list[tuple[str, Callable[[random.Random], _Parts]]] = [
    ("fields", _fields),
    ("fields", _fields),
    ("damaged", _damaged),
    ("packed", _packed),
    ("addressed", _addressed),
    ("told", _told),
    ("large", _large),
    ("raw", _addressed),
]
