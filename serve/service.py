"""The BentoML service: the app's routes, mounted at the root, and one API method for BentoML's own client.

Settings come from the environment (settings.py): UNI_INSTRUCT_BUNDLE, UNI_INSTRUCT_ENGINE and so on. Importing this
module loads no model.
"""

import os
from http import HTTPStatus

# Before the imports: BentoML, Gradio and prometheus-client read these variables when they are imported.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "true")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
if os.environ.get("UNI_INSTRUCT_WORKERS", "1") in ("", "1"):
    # With this variable every counter is in a file that other workers can read. That takes five times as long, and a request
    # updates a dozen counters; a single worker does not need it.
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)

import bentoml
import numpy as np
from starlette.middleware import Middleware

from uni_instruct.errors import UniInstructError
from uni_instruct.serve.app import create_app
from uni_instruct.serve.metrics import use_private_folder
from uni_instruct.serve.models.registry import Models
from uni_instruct.serve.process.supervision import check_workers_often
from uni_instruct.serve.routes.bento_route import BentoRouteMiddleware, drop_refusals_from_log, note_error
from uni_instruct.serve.routes.responses import generate_images
from uni_instruct.serve.routes.schema import GenerateRequest, resolve
from uni_instruct.serve.settings import settings_from_environment
from uni_instruct.system.processes import die_with_parent

check_workers_often()
use_private_folder()
drop_refusals_from_log()
_settings = settings_from_environment()
_app = create_app(_settings)

# An editable install from the Bento's own sources: train/, export/ and serve/ are found as folders beside uni_instruct/.
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
    # 30 s longer than the server's own timeout, so that clients get the server's 504, which has more detail.
    traffic={"timeout": _settings.timeout_s + 30},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
    # An OpenTelemetry span costs as much time as all the other Python code of a request.
    tracing={} if _settings.tracing else {"excluded_urls": ".*"},
)
@bentoml.asgi_app(_app, path="/")
class UniInstruct:
    """One-step image generators. POST /v1/generate returns files; the method below returns arrays to BentoML's client."""

    def __init__(self) -> None:
        # Only workers create the service. If their supervisor is killed, they must end too, instead of running on.
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
        """Return images uint8 [N, H, W, C]."""
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


# Added here as well as in the app: BentoML's own routes, such as /generate for the method above, do not pass through the app.
_own_route = Middleware(BentoRouteMiddleware, limit_bytes=_settings.max_body_bytes, metrics=_app.state.models.metrics)
for _middleware in (_app.state.guards, _own_route):
    UniInstruct.add_asgi_middleware(_middleware.cls, **_middleware.kwargs)  # type: ignore[attr-defined]
