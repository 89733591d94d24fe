"""GET /v1/models and GET /v1/spec: the models that are served, and the facts about one of them, for JSON."""

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

from uni_instruct import __version__
from uni_instruct.serve.models.registry import Models
from uni_instruct.serve.models.served_model import ServedModel

_REPORTED_PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt_rtx", "torch", "bentoml")


def model_list(models: Models) -> dict[str, object]:
    """Return all models, loaded or not, in the shape of OpenAI's model list, which generic clients request."""
    return {"object": "list", "data": [model_entry(models.get(name)) for name in models.names]}


def model_entry(served: ServedModel) -> dict[str, object]:
    """Return one model in the shape of OpenAI's models, plus its state: 'loading', 'ready', 'failed' or 'closed'."""
    return {"id": served.name, "object": "model", "created": 0, "owned_by": "uni-instruct", "state": served.state}


def model_info(served: ServedModel) -> dict[str, object]:
    """Return a model's shape, classes, provenance, engines, limits and versions. Raises NotReadyError until it is loaded."""
    bundle, engine, settings = served.bundle, served.engine, served.settings
    spec = bundle.spec
    return {
        "name": served.name,
        "image_shape": list(spec.image_shape),
        "num_classes": spec.num_classes,
        "class_names": [spec.class_name(class_id) for class_id in range(spec.num_classes)],
        "mixes_classes": engine.mixes_classes,
        "steps": spec.steps,
        "licence": spec.licence,
        "provenance": dict(spec.provenance),
        "weights_sha256": bundle.weights_sha256,
        "engine": str(engine.id),
        "device": engine.device,
        "precision": engine.id.precision,
        "engines": [status.facts() for status in served.selection.statuses],
        "batch_sizes": list(served.batch_sizes),
        "limits": {
            "images_per_request": settings.request_images,
            "images_in_queue": settings.queue_images,
            "timeout_s": settings.timeout_s,
        },
        "versions": {"uni-instruct": __version__, "python": platform.python_version(), **_versions()},
    }


@functools.cache  # reading them from files takes time, and they do not change while this process lives
def _versions() -> dict[str, str]:
    found = {}
    for package in _REPORTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # not every runtime has to be installed
    return found
