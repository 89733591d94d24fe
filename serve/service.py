"""The BentoML service: the app's routes, mounted at the root, and one method for BentoML's own client.

Settings come from the environment (settings.py): UNI_INSTRUCT_BUNDLE, UNI_INSTRUCT_ENGINE and so on. Importing this
module loads no model.
"""

import os
from http import HTTPStatus

# Before the imports: all of these packages read the environment when they are imported.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if os.environ.get("UNI_INSTRUCT_WORKERS", "1") in ("", "1"):
    # A count in a file, which other workers can read, takes five times as long, and there are a dozen to a request.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

import bentoml
import numpy as np
from starlette.middleware import Middleware

from uni_instruct.errors import UniInstructError
from uni_instruct.processes import die_with_parent
from uni_instruct.serve.app import create_app
from uni_instruct.serve.metrics import use_own_folder
from uni_instruct.serve.models.registry import Models
from uni_instruct.serve.process.supervision import check_workers_often
from uni_instruct.serve.routes.bento_route import BentoRouteMiddleware, drop_refusals_from_log, note_error
from uni_instruct.serve.routes.responses import generate_images
from uni_instruct.serve.routes.schema import GenerateRequest, resolve
from uni_instruct.serve.settings import settings_from_environment

check_workers_often()
use_own_folder()
drop_refusals_from_log()
_settings = settings_from_environment()
_app = create_app(_settings)

# The package is installed from the bento's own sources, which is what finds its stages beside it.
_image = (
    bentoml.images.Image(python_version="3.11", lock_python_packages=False)
    .build_include("pyproject.toml", "README.md", "LICENSE", "uni_instruct", "serve", "export", "train")
    .python_packages("prometheus-client")
    .run("uv pip install -e './src[serve]'")
)


@bentoml.service(
    name="uni-instruct",
    image=_image,
    workers=_settings.workers,
    # Later than the server's own timeout, whose response (504) says more.
    traffic={"timeout": _settings.timeout_s + 30},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    # A span costs as much as all of the rest of a request's Python.
    tracing={} if _settings.tracing else {"excluded_urls": ".*"},
)
@bentoml.asgi_app(_app, path="/")
class UniInstruct:
    """One-step image generators. POST /v1/generate answers files; this method answers arrays to BentoML's client."""

    def __init__(self) -> None:
        # Only workers get here. Their supervisor may be killed, and would leave them running.
        die_with_parent(os.getppid())()
        self._models: Models = _app.state.models

    @bentoml.api
    async def generate(
        self,
        seeds: list[int] | None = None,
        num_images: int | None = None,
        class_ids: list[int] | None = None,
        classes: list[str] | None = None,
        model: str | None = None,
    ) -> np.ndarray:
        """Images uint8 [N, H, W, C]."""
        wanted = GenerateRequest(
            seeds=None if seeds is None else list(seeds),
            num_images=num_images,
            class_ids=class_ids,
            classes=classes,
            model=model,
            seed_format=None,
            format="npz",
            grid=False,
        )
        try:
            with self._models.using(model) as served:
                job = resolve(wanted, served.spec, _settings.request_images)
                return (await generate_images(served, job.seeds, job.class_ids)).images
        except UniInstructError as error:
            note_error(error)
            raise bentoml.exceptions.BentoMLException(str(error), error_code=HTTPStatus(error.http_status)) from error

    def __is_alive__(self) -> bool:
        return self._models.alive

    def __is_ready__(self) -> bool:
        return self._models.ready


# Here as well as in the app: BentoML's own routes, such as that of `generate` above, do not pass through the app.
_own_route = Middleware(BentoRouteMiddleware, limit_bytes=_settings.max_body_bytes, metrics=_app.state.models.metrics)
for _middleware in (_app.state.guards, _own_route):
    UniInstruct.add_asgi_middleware(_middleware.cls, **_middleware.kwargs)  # type: ignore[attr-defined]
