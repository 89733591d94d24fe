"""An open-loop load test: requests are sent at fixed times, whether or not earlier ones have been answered."""

import base64
import http.client
import io
import json
import threading
import time
import urllib.parse
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from uni_instruct.engine import Engine
from uni_instruct.errors import RequestError
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.system.progress import ProgressFactory, silent

# The most requests that wait for an answer at the same time. With more, the test would measure the client's machine.
_MAX_IN_FLIGHT = 256
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """The answer to one request. status: HTTP status, 0 if there was none. latency_ms: from the time the request was due."""

    seeds: Sequence[int]
    status: int
    latency_ms: float
    body: bytes


class TargetServer:
    """The server under load: its URL, and an API key in bytes. Raises RequestError for a malformed URL."""

    def __init__(self, url: str, key: bytes | None = None):
        try:
            parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")  # as the system does later; it fails for a name such as 'a..b'
        except ValueError:  # a port that is not a number, an incomplete IPv6 address, or no host name
            host = port = None
        if not host or parts.scheme not in ("http", "https"):
            raise RequestError(
                f"{url} is not the URL of a server", remedy="give one, such as http://127.0.0.1:3000", param="url"
            )
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._prefix = host, port, parts.path.rstrip("/")
        # Basic, because its base64 can carry a key with any characters; a plain header value may only hold ASCII.
        basic = {"Authorization": f"Basic {base64.b64encode(b':' + key).decode()}"} if key else {}
        self._headers = {"Content-Type": "application/json", **basic}
        self._local = threading.local()

    def ask(self, method: str, path: str, fields: Mapping[str, object] | None = None) -> tuple[int, bytes]:
        """Send a request on this thread's own connection, and return status and body of the answer.

        Raises OSError or HTTPException if there is no answer.
        """
        connection = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._connect(self._host, self._port, timeout=_TIMEOUT_S)
        try:
            connection.request(method, self._prefix + path, json.dumps(fields) if fields is not None else None, self._headers)
            response = connection.getresponse()
            return response.status, response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            raise

    def facts(self, model: str | None) -> dict[str, str]:
        """Return name, engine and weights_sha256 of the model with that name; None: the server's first model.

        Raises RequestError if the server does not answer, or not as `uni-instruct serve` does.
        """
        query = f"?model={urllib.parse.quote(model)}" if model else ""
        try:
            status, body = self.ask("GET", f"/v1/spec{query}")
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"the server does not answer: {error}", remedy="start it, or give another URL") from None
        if status != 200:
            problem = f"the server answers {status}: {body[:200].decode(errors='replace')}"
            raise RequestError(problem, remedy="set UNI_INSTRUCT_API_KEY to its key, or choose another --model")
        try:
            answer = json.loads(body)
            return {name: str(answer[name]) for name in ("name", "engine", "weights_sha256")}
        except (ValueError, TypeError, KeyError, IndexError):
            problem = "the server at this URL is not 'uni-instruct serve': its GET /v1/spec does not describe a generator"
            raise RequestError(problem, remedy="give the URL of 'uni-instruct serve'") from None


def apply_load(
    target: TargetServer, model: str, rate: float, seconds: float, images: int, with_progress: ProgressFactory = silent
) -> list[Answer]:
    """Send `rate` requests a second for `seconds` seconds, and return all answers in the order of the requests.

    Each request asks for `images` images, of seeds that no other request has.
    """
    start = time.perf_counter()

    def ask(index: int) -> Answer:
        due = start + index / rate
        seeds = list(range(index * images, (index + 1) * images))
        try:
            status, body = target.ask("POST", "/v1/generate", {"model": model, "seeds": seeds, "format": "npz"})
        except (OSError, http.client.HTTPException):
            status, body = 0, b""
        return Answer(seeds, status, 1e3 * (time.perf_counter() - due), body)

    waiting, requests = [], max(1, round(rate * seconds))
    with with_progress("load", requests, "requests") as bar, ThreadPoolExecutor(_MAX_IN_FLIGHT) as pool:
        for index in range(requests):
            time.sleep(max(0.0, start + index / rate - time.perf_counter()))
            waiting.append(pool.submit(ask, index))
            bar.advance(1)
    return [answer.result() for answer in waiting]


def count_wrong(answers: Sequence[Answer], engine: Engine, tolerance: int, with_progress: ProgressFactory = silent) -> int:
    """Count the received images in which a pixel differs by more than `tolerance` (of 255) from the one that `engine` makes.

    An answer that cannot be read, or with other seeds or shapes than requested, counts with all of its images.
    """
    made = [answer for answer in answers if answer.status == 200]
    wrong = 0
    with with_progress("check", len(made), "answers") as bar:
        for answer in made:
            wrong += _wrong(answer, engine, tolerance)
            bar.advance(1)
    return wrong


def _wrong(answer: Answer, engine: Engine, tolerance: int) -> int:
    seeds = list(answer.seeds)
    expected = generate_images(engine, seeds, resolve_class_ids(engine.spec, seeds)).astype(np.int64)
    try:
        with np.load(io.BytesIO(answer.body)) as arrays:
            images, named = arrays["arr_0"], arrays["seeds"].tolist()
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        return len(seeds)
    if named != seeds or images.shape != expected.shape or images.dtype != np.uint8:
        return len(seeds)
    return int((np.abs(images - expected).reshape(len(seeds), -1).max(axis=1) > tolerance).sum())


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, object]:
    """Return a report for JSON: answers by status, and the rate and latency quantiles of those with status 200."""
    made = [answer for answer in answers if answer.status == 200]
    statuses = Counter("no answer" if answer.status == 0 else str(answer.status) for answer in answers)
    latencies = np.array([answer.latency_ms for answer in made] or [np.nan])
    quantiles = {f"p{q:g}_ms": round(float(np.percentile(latencies, q)), 2) for q in (50, 90, 99, 99.9)}
    return {
        "requests": len(answers),
        "statuses": dict(sorted(statuses.items())),
        "images": sum(len(answer.seeds) for answer in made),
        "images_per_s": round(sum(len(answer.seeds) for answer in made) / seconds, 2),
        **(quantiles if made else {}),
    }
