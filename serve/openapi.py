"""GET /openapi.json: a description of every route with its parameters, types and statuses, for /docs and for tools."""

from pydantic import BaseModel

from uni_instruct import __version__
from uni_instruct.serve.demo.compare import CompareRequest
from uni_instruct.serve.routes.bento_route import BentoRequest
from uni_instruct.serve.routes.openai_images import ImagesRequest
from uni_instruct.serve.routes.schema import GenerateRequest
from uni_instruct.serve.routes.walk import WalkRequest

_Json = dict[str, object]


def openapi_document(*, demo: bool) -> _Json:
    """Return the OpenAPI document. Request bodies are described by the pydantic models that check them, so both always agree.

    demo: whether to include the routes that only the demo's page needs.
    """
    return {
        "openapi": "3.1.0",
        "info": {"title": "Uni-Instruct", "version": __version__, "description": "One-step image generators."},
        "paths": {**_POSTS, **_GETS, **(_DEMO if demo else {})},
        "components": {
            "schemas": {"Error": _ERROR, "Model": _MODEL, "Images": _IMAGES_ANSWER},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # The empty entry makes the key optional, because it depends on the server's settings whether one is needed.
        "security": [{}, {"key": []}],
    }


def _object(**properties: object) -> _Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _or_null(type_: str) -> _Json:
    return {"type": [type_, "null"]}


_TEXT: _Json = {"type": "string"}
_INTEGER: _Json = {"type": "integer"}
_NUMBER: _Json = {"type": "number"}
_ERROR = _object(
    error=_object(message=_TEXT, type=_TEXT, param=_or_null("string"), code=_TEXT, remedy=_TEXT),
)
_MODEL = _object(
    id=_TEXT,
    object={"const": "model"},
    created=_INTEGER,
    owned_by=_TEXT,
    state={"enum": ["loading", "ready", "failed", "closed"]},
)
_SEED: _Json = {
    "type": ["integer", "string"],
    "description": "A string of digits if seed_format is 'string', or if seeds were given as strings.",
}
_FACTS: _Json = {"seed": _SEED, "class_id": _or_null("integer"), "class_name": _or_null("string")}
_IMAGES_ANSWER: _Json = _object(
    created=_INTEGER,
    model=_TEXT,
    data={
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"b64_json": _TEXT, "url": _TEXT, "revised_prompt": _or_null("string"), **_FACTS},
            "required": ["seed", "class_id", "class_name", "revised_prompt"],
        },
    },
    background={"const": "opaque"},
    output_format={"enum": ["png", "jpeg", "webp"]},
    quality=_TEXT,
    size=_TEXT,
)
_GENERATE_ANSWER = _object(images={"type": "array", "items": _object(**_FACTS, b64_png=_TEXT)})
_LIST_ANSWER = _object(object={"const": "list"}, data={"type": "array", "items": {"$ref": "#/components/schemas/Model"}})
_SPEC_PROPERTIES: _Json = {
    "name": _TEXT,
    "image_shape": {"type": "array", "items": _INTEGER},
    "num_classes": _INTEGER,
    "class_names": {"type": "array", "items": _TEXT},
    "mixes_classes": {"type": "boolean"},
    "steps": _INTEGER,
    "weights_sha256": _TEXT,
    "engine": _TEXT,
    "device": _TEXT,
    "precision": _TEXT,
    "engines": {"type": "array"},
    "batch_sizes": {"type": "array", "items": _INTEGER},
    "limits": {"type": "object"},
    "versions": {"type": "object"},
}
_SPEC_ANSWER: _Json = {
    "type": "object",
    "properties": _SPEC_PROPERTIES,
    "required": ["name", "image_shape", "num_classes", "class_names", "weights_sha256", "engine", "batch_sizes", "limits"],
}
_ABOUT_ANSWER: _Json = {
    **_SPEC_ANSWER,
    "properties": {
        **_SPEC_PROPERTIES,
        "card": {**_TEXT, "description": "The model card in Markdown."},
        "pictures": {"type": "array", "items": _TEXT},
        "compare": {"type": "array", "items": _object(id=_TEXT, label=_TEXT)},
        "teacher": {
            "oneOf": [{"type": "null"}, _object(steps=_INTEGER, evaluations=_INTEGER, at_hand={"type": "boolean"})],
        },
        "needs_key": {"type": "boolean"},
    },
}
_COMPARE_ANSWER = _object(
    sides={
        "type": "array",
        "items": _object(id=_TEXT, steps=_INTEGER, evaluations=_INTEGER, device=_TEXT, model_ms=_NUMBER, b64_png=_TEXT),
        "minItems": 2,
        "maxItems": 2,
    },
    difference=_object(largest_levels=_INTEGER, mean_levels=_NUMBER, equal_share=_NUMBER, gain=_INTEGER, b64_png=_TEXT),
)

# Error status -> its description. The bodies of all of them have the schema `Error`.
_FAILURES = {
    400: "The request is wrong: problem, value and remedy.",
    401: "The API key is missing or wrong.",
    404: "No such model, or no such image.",
    413: "The body is too large.",
    415: "The body's content type or encoding is not supported.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "The engine failed.",
    503: "The generator is loading, or could not be loaded, or the server is stopping.",
    504: "The images were not made in time.",
}
_MAKING = (400, 401, 404, 413, 415, 429, 500, 503, 504)


def _failures(*statuses: int) -> _Json:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {str(status): {"description": _FAILURES[status], "content": content} for status in statuses}


def _answer(description: str, **content: object) -> _Json:
    """Describe a 200 answer. content: media type -> schema; the first '_' in a keyword stands for '/', as in image_png."""
    contents = {media.replace("_", "/", 1): {"schema": schema} for media, schema in content.items()}
    return {"200": {"description": description, "content": contents}}


def _post(summary: str, model: type[BaseModel], example: _Json, answer: _Json) -> _Json:
    content = {"application/json": {"schema": model.model_json_schema(), "example": example}}
    body = {"content": content, "required": any(field.is_required() for field in model.model_fields.values())}
    responses: _Json = {**answer, **_failures(*_MAKING)}
    return {"post": {"summary": summary, "requestBody": body, "responses": responses}}


def _get(summary: str, answer: _Json, *failures: int, parameters: list[_Json] | None = None) -> _Json:
    responses: _Json = {**answer, **_failures(*failures)}
    return {"get": {"summary": summary, "parameters": parameters or [], "responses": responses}}


def _parameter(name: str, where: str, description: str, schema: _Json) -> _Json:
    return {"name": name, "in": where, "required": where == "path", "description": description, "schema": schema}


_BINARY: _Json = {"type": "string", "format": "binary"}
_PICTURES: _Json = {"image_png": _BINARY, "image_jpeg": _BINARY, "image_webp": _BINARY}
_HEADERS = (
    "X-Class-Ids has their classes; X-Model and X-Engine name what made them; X-Engines-Refused lists engines of the bundle "
    "that are not trusted on this machine; Server-Timing has the milliseconds in queue, model and encoding."
)
_IMAGES = f"The images. Headers: X-Seeds has their seeds; {_HEADERS}"
_WALK = f"The images. Headers: {_HEADERS}"
_ARRAY: _Json = {"type": "array", "description": "uint8 [N, H, W, C], nested."}

_POSTS: _Json = {
    "/v1/generate": _post(
        "Make images",
        GenerateRequest,
        {"seeds": [7]},
        _answer(
            _IMAGES,
            **_PICTURES,
            application_json=_GENERATE_ANSWER,
            application_zip=_BINARY,
            **{"application_octet-stream": _BINARY},
        ),
    ),
    "/v1/walk": _post(
        "Make images between seeds",
        WalkRequest,
        {"seeds": [7, 8], "positions": [0.5]},
        _answer(_WALK, **_PICTURES, application_zip=_BINARY),
    ),
    "/v1/images/generations": _post(
        "Make images, in OpenAI's shape; the prompt is a class, this is not a text-to-image model",
        ImagesRequest,
        {"prompt": "", "n": 1},
        _answer(
            "The images; with stream, server-sent events.",
            application_json={"$ref": "#/components/schemas/Images"},
            **{"text_event-stream": _TEXT},
        ),
    ),
    "/generate": _post(
        "Make images for BentoML's client", BentoRequest, {"seeds": [7]}, _answer("The pixels.", application_json=_ARRAY)
    ),
}

_IMAGE_RESPONSES: _Json = {
    **_answer("The image, with ETag and Cache-Control.", **_PICTURES),
    "304": {"description": "The client has it already."},
    **_failures(400, 401, 404, 429, 500, 503, 504),
}
_MODEL_QUERY = _parameter("model", "query", "Name of the model. By default the first.", _TEXT)
_NAME = _parameter("model", "path", "A model, as GET /v1/models lists them.", _TEXT)
_GETS: _Json = {
    "/v1/images/{model}/{file}": {
        "get": {
            "summary": "One image by its address: seed and format, such as 7.png",
            "parameters": [
                _NAME,
                _parameter("file", "path", "SEED.FORMAT: png, jpeg, jpg or webp.", {**_TEXT, "example": "7.png"}),
                _parameter("class", "query", "A class by name or id. By default the seed draws one.", _TEXT),
                _parameter("size", "query", "The model's own size, such as 64x64, or a whole multiple of it.", _TEXT),
                _parameter(
                    "weights",
                    "query",
                    "The first 8 or more digits of weights_sha256: 404 once other weights are served.",
                    _TEXT,
                ),
                _parameter("If-None-Match", "header", "The ETag of the image that the client has.", _TEXT),
            ],
            "responses": _IMAGE_RESPONSES,
        }
    },
    "/v1/models": _get("What is served, in the shape of OpenAI's list", _answer("All.", application_json=_LIST_ANSWER), 401),
    "/v1/models/{model}": _get(
        "One model",
        _answer("The model.", application_json={"$ref": "#/components/schemas/Model"}),
        401,
        404,
        parameters=[_NAME],
    ),
    "/v1/spec": _get(
        "Shape, classes, engine, precision, limits and versions",
        _answer("The facts.", application_json=_SPEC_ANSWER),
        401,
        404,
        503,
        parameters=[_MODEL_QUERY],
    ),
    "/metrics": _get("Metrics for Prometheus", _answer("The text format.", text_plain=_TEXT), 401),
}
_DEMO: _Json = {
    "/v1/about": _get(
        "The facts of /v1/spec, the model card, and what it can be compared with; only if the demo is served",
        _answer("The facts.", application_json=_ABOUT_ANSWER),
        401,
        404,
        503,
        parameters=[_MODEL_QUERY],
    ),
    "/v1/about/{picture}": _get(
        "A picture of the card",
        _answer("The picture.", image_png=_BINARY),
        401,
        404,
        503,
        parameters=[_parameter("picture", "path", "As 'pictures' of /v1/about lists them.", _TEXT), _MODEL_QUERY],
    ),
    "/v1/compare": _post(
        "The same noise through the served engine and another, or the teacher; only if the demo is served",
        CompareRequest,
        {"other": "torch-fp32", "seeds": [7]},
        _answer("Both, and their difference.", application_json=_COMPARE_ANSWER),
    ),
}
_PROBES = {
    "/livez": "200 while the server is alive; 503 if only a restart helps (no generator loaded, or a queue has stopped)",
    "/healthz": "The same as /livez",
    "/readyz": "200 once the server is ready; one line per generator with its state",
}
for _path, _summary in _PROBES.items():
    _plain: _Json = {"text/plain": {"schema": _TEXT}}
    _GETS[_path] = {
        "get": {
            "summary": _summary,
            "security": [],
            "responses": {
                "200": {"description": "Yes.", "content": _plain},
                "503": {"description": "No.", "content": _plain},
            },
        }
    }
