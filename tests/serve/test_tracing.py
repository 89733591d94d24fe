"""OpenTelemetry: a real server sends its spans to a collector, which is a server here that takes OTLP over HTTP."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse

from builders.servers import PATIENCE_S, start
from uni_instruct.bundle import Bundle

pytestmark = pytest.mark.slow

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONFIG = """
services:
  uni-instruct:
    tracing:
      exporter_type: otlp
      sample_rate: 1.0
      otlp: {{protocol: http, endpoint: "{endpoint}"}}
"""


class Collector(ThreadingHTTPServer):
    """Keeps the spans that it is sent; `came` is set once there are any."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.requests: list[ExportTraceServiceRequest] = []
        self.came = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self.server_port}/v1/traces"


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.end_headers()
        self.wfile.write(ExportTraceServiceResponse().SerializeToString())
        self.server.requests.append(request)
        self.server.came.set()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_requests_become_spans_of_the_clients_trace(exported_bundle: Bundle, collector: Collector, tmp_path: Path) -> None:
    config = tmp_path / "bentoml.yaml"
    config.write_text(CONFIG.format(endpoint=collector.endpoint))
    environment = {"BENTOML_CONFIG": str(config), "OTEL_BSP_SCHEDULE_DELAY": "100", "UNI_INSTRUCT_TRACING": "true"}
    running = start(exported_bundle, tmp_path, "--no-ui", **environment)
    try:
        running.until_announced()
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert httpx.post(f"{running.url}/v1/generate", json={"seeds": [7]}, headers=headers).status_code == 200
        assert collector.came.wait(PATIENCE_S), running.log.read_text()
        running.process.terminate()  # what is not sent yet is sent when it stops
        running.process.wait(PATIENCE_S)
    finally:
        running.kill()
    resources = [resource for request in collector.requests for resource in request.resource_spans]
    names = {attribute.value.string_value for one in resources for attribute in one.resource.attributes}
    assert "uni-instruct" in names
    spans = [span for one in resources for scope in one.scope_spans for span in scope.spans]
    (server_span,) = [span for span in spans if span.trace_id.hex() == TRACE and span.kind == span.SPAN_KIND_SERVER]
    assert server_span.parent_span_id.hex() == PARENT
    told = {attribute.key: attribute.value for attribute in server_span.attributes}
    statuses = [told[key].int_value for key in ("http.status_code", "http.response.status_code") if key in told]
    assert statuses == [200]
    assert server_span.end_time_unix_nano > server_span.start_time_unix_nano
