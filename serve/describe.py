"""What is served, in JSON: GET /v1/models, GET /v1/spec, and the OpenAPI description of the routes."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from uni_instruct import __version__
from uni_instruct.serve.backend import Backend
from uni_instruct.serve.schema import GenerateRequest

_REPORTED_PACKAGES = ("numpy", "onnxruntime", "openvino", "torch", "bentoml")


def model_list(backend: Backend) -> dict[str, Any]:
    """The one model, in the shape of OpenAI's list."""
    model = {"id": backend.bundle.spec.name, "object": "model", "created": 0, "owned_by": "uni-instruct"}
    return {"object": "list", "data": [model]}


def describe(backend: Backend) -> dict[str, Any]:
    """Shape, classes, engine, precision, limits and versions. Raises NotReadyError until it is loaded."""
    bundle, engine, settings = backend.bundle, backend.engine, backend.settings
    spec = bundle.spec
    return {
        "name": spec.name,
        "image_shape": list(spec.image_shape),
        "num_classes": spec.num_classes,
        "class_names": [spec.class_name(class_id) for class_id in range(spec.num_classes)],
        "steps": spec.steps,
        "licence": spec.licence,
        "provenance": dict(spec.provenance),
        "weights_sha256": bundle.weights_sha256,
        "engine": str(engine.id),
        "device": engine.device,
        "precision": engine.id.precision,
        "engines": [standing.facts() for standing in backend.selection.standings],
        "batch_sizes": list(backend.batch_sizes),
        "limits": {
            "images_per_request": settings.request_images,
            "images_in_queue": settings.queue_images,
            "timeout_s": settings.timeout_s,
        },
        "versions": {"uni-instruct": __version__, "python": platform.python_version(), **_versions()},
    }


def openapi() -> dict[str, Any]:
    """The routes for people and tools; the request's fields come from the pydantic model."""
    schema = GenerateRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    image = {"schema": {"type": "string", "format": "binary"}}
    made = dict.fromkeys(("image/png", "image/jpeg", "image/webp", "application/zip"), image)
    made["application/json"] = {"schema": {"type": "object"}}
    failed = {str(status): {"description": text} for status, text in _FAILURES.items()}
    body = {"content": {"application/json": {"schema": schema, "example": {"seeds": [7]}}}}
    generate = {
        "summary": "Make images",
        "requestBody": body,
        "responses": {"200": {"description": _MADE, "content": made}, **failed},
    }
    paths: dict[str, Any] = {"/v1/generate": {"post": generate}}
    for path, summary in _READABLE.items():
        paths[path] = {"get": {"summary": summary, "responses": {"200": {"description": "The answer."}}}}
    security = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Uni-Instruct", "version": __version__, "description": "One-step image generators."},
        "paths": paths,
        "components": {"securitySchemes": security},
        "security": [{}, {"key": []}],
    }


_MADE = (
    "The images. X-Seeds and X-Class-Ids say which, X-Engine what made them, X-Engines-Refused what is not "
    "trusted on this machine, Server-Timing the milliseconds in queue, model and encoding."
)

_FAILURES = {
    400: "The request is wrong: problem, value and remedy.",
    401: "The API key is missing or wrong.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to come back.",
    503: "The generator is loading, or the server is stopping.",
    504: "The images were not made in time.",
}

_READABLE = {
    "/v1/models": "What is served, in the shape of OpenAI's list",
    "/v1/spec": "Shape, classes, engine, precision, limits and versions",
    "/livez": "Alive, unless the generator could not be loaded",
    "/readyz": "200 once the generator is warm, 503 before",
    "/metrics": "Metrics for Prometheus",
}


def _versions() -> dict[str, str]:
    found = {}
    for package in _REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
