"""Load on a server, and what came of it: an open loop, in which requests leave at their time whether others are back or not."""

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
from uni_instruct.progress import ProgressFactory, silent

# More than these do not wait for an answer at once: beyond it the machine that asks is what is measured.
_MOST_AT_ONCE = 256
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What came back of one request. status is 0 where nothing did; latency counts from when the request was due."""

    seeds: Sequence[int]
    status: int
    latency_ms: float
    body: bytes


class LoadedServer:
    """A server: its URL, and the header with its key, of which the bytes count."""

    def __init__(self, url: str, key: bytes | None = None):
        try:
            parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")  # as the system does later, where it fails of a name such as 'a..b'
        except ValueError:  # a port that is no number, half of an IPv6 address
            host = port = None
        if not host or parts.scheme not in ("http", "https"):
            raise RequestError(
                f"{url} is no address of a server", remedy="give one, such as http://127.0.0.1:3000", param="url"
            )
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._prefix = host, port, parts.path.rstrip("/")
        # Basic, as it carries any key: a header of its own may hold ASCII only.
        basic = {"Authorization": f"Basic {base64.b64encode(b':' + key).decode()}"} if key else {}
        self._headers = {"Content-Type": "application/json", **basic}
        self._local = threading.local()

    def ask(self, method: str, path: str, fields: Mapping[str, object] | None = None) -> tuple[int, bytes]:
        """Status and body, on a connection that this thread keeps. Raises OSError or HTTPException where there is no answer."""
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
        """Name, engine and weights_sha256 of what it serves under that name, None: its first.

        Raises RequestError where it does not say.
        """
        query = f"?model={urllib.parse.quote(model)}" if model else ""
        try:
            status, body = self.ask("GET", f"/v1/spec{query}")
        except (OSError, http.client.HTTPException) as error:
            raise RequestError(f"the server does not answer: {error}", remedy="start it, or give another URL") from None
        if status != 200:
            problem = f"the server answers {status}: {body[:200].decode(errors='replace')}"
            raise RequestError(problem, remedy="give its key, or another model")
        try:
            answer = json.loads(body)
            return {name: str(answer[name]) for name in ("name", "engine", "weights_sha256")}
        except (ValueError, TypeError, KeyError, IndexError):
            problem = "what answers there is another server, which gives no JSON of a generator"
            raise RequestError(problem, remedy="give the URL of 'uni-instruct serve'") from None


def apply_load(
    target: LoadedServer, model: str, rate: float, seconds: float, images: int, with_progress: ProgressFactory = silent
) -> list[Answer]:
    """Asks for `images` images `rate` times a second, each with seeds of its own, and waits for all answers."""
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
    with with_progress("load", requests, "requests") as bar, ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
        for index in range(requests):
            time.sleep(max(0.0, start + index / rate - time.perf_counter()))
            waiting.append(pool.submit(ask, index))
            bar.advance(1)
    return [answer.result() for answer in waiting]


def count_wrong(answers: Sequence[Answer], engine: Engine, tolerance: int, with_progress: ProgressFactory = silent) -> int:
    """How many of the images that came differ by more than `tolerance` of 255 levels from those that the engine makes here."""
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
    """Counts by status, and of the answers that are images their rate and the quantiles of their latency."""
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
