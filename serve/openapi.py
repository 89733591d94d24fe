"""GET /openapi.json: the description of the routes that /docs shows and that tools read."""

from pydantic import BaseModel

from uni_instruct import __version__
from uni_instruct.serve.schema import GenerateRequest
from uni_instruct.serve.walk import WalkRequest


def openapi_document() -> dict[str, object]:
    """The routes for people and tools; the request's fields come from the pydantic model, so that they cannot drift apart."""
    paths: dict[str, object] = {
        "/v1/generate": {"post": _images(GenerateRequest, "Make images", {"seeds": [7]})},
        "/v1/walk": {"post": _images(WalkRequest, "Make images between seeds", {"seeds": [7, 8], "positions": [0.5]})},
    }
    for path, summary in _READABLE.items():
        paths[path] = {"get": {"summary": summary, "responses": {"200": {"description": "The answer."}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Uni-Instruct", "version": __version__, "description": "One-step image generators."},
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        # The empty entry says that the key is optional: whether one is needed is the server's setting.
        "security": [{}, {"key": []}],
    }


def _images(body: type[BaseModel], summary: str, example: dict[str, object]) -> dict[str, object]:
    schema = body.model_json_schema(ref_template="#/components/schemas/{model}")
    image = {"schema": {"type": "string", "format": "binary"}}
    contents: dict[str, object] = dict.fromkeys(("image/png", "image/jpeg", "image/webp", "application/zip"), image)
    if body is GenerateRequest:
        contents["application/json"] = {"schema": {"type": "object"}}
    failures = {str(status): {"description": text} for status, text in _FAILURES.items()}
    return {
        "summary": summary,
        "requestBody": {"content": {"application/json": {"schema": schema, "example": example}}},
        "responses": {"200": {"description": _IMAGES_TOLD, "content": contents}, **failures},
    }


_IMAGES_TOLD = (
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
