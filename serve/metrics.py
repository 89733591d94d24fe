"""The server's metrics, for Prometheus. Every label has only a few values, so that memory does not grow with the requests."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uni_instruct.errors import UniInstructError

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
# Each worker has one file of values for each kind of metric. These are prometheus-client's names for the kinds. 1 MiB is far
# more than the values need.
_KINDS = ("counter", "gauge_livesum", "histogram")
_ROOM_BYTES = 1 << 20

# From the time of one small image on a warm engine to the default timeout.
_STAGE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
# Values of the label `outcome`: what happened to a bundle that changed on disk.
RELOAD_OUTCOMES = ("loaded", "failed")
# Values of the label `reason` (why images were not made) and of the label `stage` (the parts of a request's time).
DROP_REASONS = ("queue_full", "timeout", "cancelled", "stopping", "failed")
REQUEST_STAGES = ("queue", "model", "encode")
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServerMetrics:
    """The metrics of one worker, in a registry of their own."""

    def __init__(self) -> None:
        # Not the global registry: it would refuse the same names to a second app in one process, as in the tests.
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "uni_instruct_requests", "Answers by route and HTTP status.", ["route", "status"], registry=registry
        )
        # A cache: prometheus-client takes a lock and looks up a dictionary to find a series by its labels, here for every
        # answer. It stays small, because routes and statuses are few.
        self._answers: dict[tuple[str, int], Counter] = {}
        self.images = Counter(
            "uni_instruct_images", "Images made for requests that were completed.", ["model"], registry=registry
        )
        self.dropped = Counter(
            "uni_instruct_dropped_images",
            "Images refused or given up: the queue was full, the client left, time ran out, or the engine failed.",
            ["reason", "model"],
            registry=registry,
        )
        self.queue = self._workers("uni_instruct_queue_images", "Images waiting in the queue.", "model")
        self.ready = self._workers("uni_instruct_ready", "Workers that are ready.")
        self.model_ready = self._workers("uni_instruct_model_ready", "Workers in which the model is loaded.", "model")
        self.engine = self._workers("uni_instruct_engine", "Workers by engine id and model.", "engine", "model")
        self.reloads = Counter(
            "uni_instruct_reloads",
            "Reloads of bundles that changed on disk, by outcome: loaded or failed.",
            ["model", "outcome"],
            registry=registry,
        )
        self.batch = Histogram(
            "uni_instruct_batch_images", "Images per engine call.", ["model"], buckets=_BATCH_BUCKETS, registry=registry
        )
        self.stage = Histogram(
            "uni_instruct_stage_seconds",
            "Time of a request in the queue, in the model, and in encoding.",
            ["stage", "model"],
            buckets=_STAGE_BUCKETS_S,
            registry=registry,
        )

    def count_answer(self, route: str, status: int) -> None:
        """Count one answer of that route."""
        series = self._answers.get((route, status))
        if series is None:
            series = self._answers[route, status] = self.requests.labels(route, str(status))
        series.inc()

    def _workers(self, name: str, words: str, *labels: str) -> Gauge:
        """Create a gauge whose value is the sum over all living workers."""
        return Gauge(name, words, labels, registry=self.registry, multiprocess_mode="livesum")

    def of_model(self, name: str) -> "ModelMetrics":
        """Return the metrics of one model."""
        return ModelMetrics(self, name)


class ModelMetrics:
    """The metrics of one model. Every series exists from the start, with the value 0."""

    def __init__(self, server: ServerMetrics, name: str):
        # Looked up once, because finding a series by its labels takes a lock and a dictionary, here for every image.
        self.images = server.images.labels(name)
        self.queue = server.queue.labels(name)
        self.batch = server.batch.labels(name)
        self.dropped = {reason: server.dropped.labels(reason, name) for reason in DROP_REASONS}
        for outcome in RELOAD_OUTCOMES:
            server.reloads.labels(name, outcome)
        self._stage = {stage: server.stage.labels(stage, name) for stage in REQUEST_STAGES}

    def record_stages(self, stage_ms: dict[str, float]) -> None:
        """Record a request's milliseconds by stage. Runs later on the event loop, so that the answer need not wait for it."""
        asyncio.get_running_loop().call_soon(self._observe, stage_ms)

    def _observe(self, stage_ms: dict[str, float]) -> None:
        for stage, milliseconds in stage_ms.items():
            self._stage[stage].observe(milliseconds / 1e3)


class CountedApp:
    """Wraps a mounted ASGI app that has routes of its own, and counts all of its answers under one route."""

    def __init__(self, app: ASGIApp, route: str, metrics: ServerMetrics):
        self._app, self._route, self._metrics = app, route, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_answer(self._route, message["status"])
            await send(message)

        await self._app(scope, receive, counted)


def exposition(metrics: ServerMetrics, workers: int) -> bytes:
    """Return the text that Prometheus scrapes: this worker's metrics, or the sums over all workers if there are several."""
    # To sum over processes, prometheus-client has each one write its values into files in one folder. BentoML sets that folder.
    folder = os.environ.get(_FOLDER)
    if workers == 1 or not folder:
        return generate_latest(metrics.registry)
    _drop_dead_workers(Path(folder))
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)
    return generate_latest(registry)


def use_private_folder() -> None:
    """Put this worker's metric files in a folder that only the workers of the same supervisor share.

    Must be called before any metric is created. BentoML has one folder for all servers of a BENTOML_HOME, and each server
    empties it when it starts. The new folder is beside BentoML's, or in the system's temporary folder if that one cannot be
    written. Folders of servers on this host that have ended are removed. Raises UniInstructError if neither can be written.
    """
    shared = os.environ.get(_FOLDER)
    if not shared:
        return
    # The user id is part of the name, because another user's folder would not be writable.
    elsewhere = Path(tempfile.gettempdir()) / f"uni-instruct-metrics-{os.getuid()}"
    servers = _first_writable([Path(shared).parent / "uni-instruct-metrics", elsewhere])
    os.environ[_FOLDER] = str(servers / _server_name(os.getppid()))
    # Matches only folders of exactly this host: on host `web` the folders of host `web-1` must not match.
    ours = re.compile(rf"{re.escape(socket.gethostname())}-([0-9]+)-[0-9]+")
    for other in servers.iterdir():
        found = ours.fullmatch(other.name)
        if found and other.name != _server_name(int(found[1])):
            shutil.rmtree(other, ignore_errors=True)


def _first_writable(folders: list[Path]) -> Path:
    reasons = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _preallocate(folder / _server_name(os.getppid()))
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
        else:
            return folder
    raise UniInstructError(
        f"the metrics of several workers cannot be stored: {'; '.join(reasons)}",
        remedy="free space there, set BENTOML_HOME to a folder that can be written, or serve with --workers 1",
    )


def _preallocate(folder: Path) -> None:
    """Create this worker's metric files at their full size, before prometheus-client opens them.

    The files are mapped into memory, and those that prometheus-client creates are sparse: if the disk is full when a hole is
    first written to, the kernel kills the process. Raises OSError, and leaves no file, if there is no room now.
    """
    folder.mkdir(exist_ok=True)
    files = [folder / f"{kind}_{os.getpid()}.db" for kind in _KINDS]
    try:
        for path in files:
            with path.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, _ROOM_BYTES)
    except OSError:
        for path in files:
            path.unlink(missing_ok=True)
        raise


def _server_name(supervisor: int) -> str:
    """Return a unique name for a server on this machine: host, process id of its supervisor, and when that process started.

    The start time is needed because the system reuses process ids. Empty if there is no such process.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        return f"{socket.gethostname()}-{supervisor}-{int(psutil.Process(supervisor).create_time())}"
    return ""


def _drop_dead_workers(folder: Path) -> None:
    """Remove killed workers from the gauges, which describe the present. What they added to counters stays counted."""
    living = {os.getpid()}
    with contextlib.suppress(psutil.NoSuchProcess):
        living |= {process.pid for process in psutil.Process(os.getppid()).children()}
    for file in folder.glob("gauge_live*_*.db"):
        worker = int(file.stem.rpartition("_")[2])
        if worker not in living:
            with contextlib.suppress(FileNotFoundError):
                mark_process_dead(worker, str(folder))
