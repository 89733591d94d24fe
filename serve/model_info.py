"""What is served, in JSON: GET /v1/models and GET /v1/spec."""

import platform
from importlib.metadata import PackageNotFoundError, version

from uni_instruct import __version__
from uni_instruct.serve.backend import Backend

_REPORTED_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt_rtx", "torch", "bentoml")


def model_list(backend: Backend) -> dict[str, object]:
    """The one model, in the shape of OpenAI's list, which clients of other servers ask for. Raises NotReadyError."""
    model = {"id": backend.bundle.spec.name, "object": "model", "created": 0, "owned_by": "uni-instruct"}
    return {"object": "list", "data": [model]}


def model_info(backend: Backend) -> dict[str, object]:
    """Shape, classes, engine, precision, limits and versions. Raises NotReadyError until the generator is loaded."""
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


def _versions() -> dict[str, str]:
    found = {}
    for package in _REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # only one engine's runtime has to be there
    return found
