"""What the server measures, for Prometheus. Every label has few values: nothing grows with the requests."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

# From one small image on a warm engine to the default timeout.
_STAGE_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
# Why images are not made, and what a request passes through.
DROP_REASONS = ("queue_full", "timeout", "cancelled", "stopping", "failed")
STAGES = ("queue", "model", "encode")
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class ServerMetrics:
    """One worker's counters, in a registry of their own."""

    def __init__(self) -> None:
        # Of its own: the global one would refuse the same names to a second app in one process, as tests have it.
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "uni_instruct_requests", "Answers by route and HTTP status.", ["route", "status"], registry=registry
        )
        self.images = Counter("uni_instruct_images", "Images made and answered.", ["model"], registry=registry)
        self.dropped = Counter(
            "uni_instruct_dropped_images",
            "Images refused or given up: the queue was full, the client left, time ran out, or the engine failed.",
            ["reason", "model"],
            registry=registry,
        )
        self.queue = Gauge(
            "uni_instruct_queue_images", "Images waiting.", ["model"], registry=registry, multiprocess_mode="livesum"
        )
        self.ready = Gauge("uni_instruct_ready", "Workers that are ready.", registry=registry, multiprocess_mode="livesum")
        self.model_ready = Gauge(
            "uni_instruct_model_ready",
            "Workers in which the model is loaded and warm.",
            ["model"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.engine = Gauge(
            "uni_instruct_engine",
            "Workers by engine id and model.",
            ["engine", "model"],
            registry=registry,
            multiprocess_mode="livesum",
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

    def of_model(self, name: str) -> "ModelMetrics":
        """What is counted for that model alone."""
        return ModelMetrics(self, name)


class ModelMetrics:
    """One model's counters; every series of it is there from the start, at zero."""

    def __init__(self, server: ServerMetrics, name: str):
        # Looked up once: finding a series by its labels takes a lock and a dictionary, for every image.
        self.images = server.images.labels(name)
        self.queue = server.queue.labels(name)
        self.batch = server.batch.labels(name)
        self.dropped = {reason: server.dropped.labels(reason, name) for reason in DROP_REASONS}
        self.stage = {stage: server.stage.labels(stage, name) for stage in STAGES}


def exposition(metrics: ServerMetrics, workers: int) -> bytes:
    """The text that Prometheus scrapes: of this worker, or summed over all where there are several."""
    # prometheus-client's way to sum over processes: each writes its counts into a file of that folder, which BentoML sets.
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if workers == 1 or not folder:
        return generate_latest(metrics.registry)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)
    return generate_latest(registry)
