"""Run the app on Ray Serve: `serve run uni_instruct.serve.ray_serve:build bundle=digits replicas=2`.

Each replica is a server as `uni-instruct serve` runs it, behind Ray's proxy. Its own batcher combines the requests that Ray
sends it, so Ray may send many at once, and Ray's batching is not used.
"""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from uni_instruct.bundle import Bundle
from uni_instruct.errors import RequestError
from uni_instruct.serve.model_sources import sources_by_name
from uni_instruct.serve.settings import Settings, settings_from_environment, variable
from uni_instruct.system.ray_cluster import import_ray_serve

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.applications import Starlette

NAME = "uni-instruct"
# How many requests Ray may send to a replica at once. Its default of 5 would never fill a batch of 64 images.
_MAX_ONGOING_REQUESTS = 1000
_POLL_INTERVAL_S = 0.1
_CHECK_EVERY_S = 5.0
# Of replicas, CPUs and GPUs. Larger values are taken for typing errors.
_MAX_NUMBER = 10_000


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The resources to request from Ray: the number of replicas, and the CPUs and GPUs of each."""

    replicas: int = 1
    cpus: float = 1.0
    gpus: float = 0.0


def build(arguments: Mapping[str, str]) -> "Application":
    """Build the application that `serve run` deploys.

    arguments: replicas, cpus, gpus, and any setting of docs/serving.md by its name in lower case (bundle, engine, timeout_s),
    except workers and api_key. An argument takes precedence over the setting's environment variable. The folders of bundles
    must exist on every node; generators that ship with the package or are on the hub are available everywhere.
    Raises RequestError for an unknown argument or a bad value, MissingExtraError if Ray Serve is not installed.
    """
    serve = import_ray_serve()
    placement, settings = parse(arguments)
    for source in sources_by_name(settings.bundle).values():
        Bundle.open(source).check_makes_pictures()
    # No demo with several replicas, because it keeps its state in one process.
    settings = replace(settings, ui=settings.ui and placement.replicas == 1)
    deployment = serve.deployment(
        name=NAME,
        num_replicas=placement.replicas,
        ray_actor_options={"num_cpus": placement.cpus, "num_gpus": placement.gpus},
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        graceful_shutdown_timeout_s=settings.grace_s,
        health_check_period_s=_CHECK_EVERY_S,
    )
    return deployment(serve.ingress(_app_of(settings))(Generators)).bind()


class Generators:
    """A replica. Ray creates the app in it, which loads in the background, and checks its health before sending requests."""

    app: "Starlette"  # Ray Serve's own attribute

    async def check_health(self) -> None:
        """Wait until the server is ready; Ray sends no requests before. Raises RuntimeError if only a restart helps."""
        models = self.app.state.models
        while models.alive and not models.ready:
            await asyncio.sleep(_POLL_INTERVAL_S)
        if not models.alive:
            raise RuntimeError("no generator could be loaded, or its queue is no longer served; the replica's log says why")


def _app_of(settings: Settings) -> Any:
    """Return a function that creates the app. Ray calls it in the replica, because an app with threads cannot be pickled."""

    def app() -> "Starlette":
        from uni_instruct.serve.app import create_app

        return create_app(settings)

    return app


def parse(arguments: Mapping[str, str]) -> tuple[Placement, Settings]:
    """Parse the arguments of `build`. Raises RequestError."""
    return _placement(arguments), _settings(arguments)


def _settings(arguments: Mapping[str, str]) -> Settings:
    names = {setting.name for setting in fields(Settings)} - {"workers", "api_key"}
    known = {*names, *(field.name for field in fields(Placement))}
    for name in arguments:
        if name not in known:
            raise RequestError(f"'{name}' is not a setting", remedy=f"choose from {', '.join(sorted(known))}", param=name)
    given = {variable(name): str(value) for name, value in arguments.items() if name in names}
    settings = settings_from_environment({**os.environ, variable("workers"): "", **given})
    # Absolute paths, because replicas run in another working directory.
    sources = {name: os.path.abspath(s) if os.path.isdir(s) else s for name, s in sources_by_name(settings.bundle).items()}
    bundles = tuple(f"{name}={source}" for name, source in sources.items())
    key_file = settings.api_key_file and os.path.abspath(settings.api_key_file)
    return replace(settings, bundle=bundles, api_key_file=key_file)


def _placement(arguments: Mapping[str, str]) -> Placement:
    values: dict[str, Any] = {}
    for field in fields(Placement):
        if field.name in arguments:
            values[field.name] = _number(field.name, arguments[field.name], whole=field.name == "replicas")
    return Placement(**values)


def _number(name: str, text: str, *, whole: bool) -> float:
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = -1
    if not (0 if name == "gpus" else 1e-3) <= number <= _MAX_NUMBER:
        remedy = f"give an integer from 1 to {_MAX_NUMBER}" if whole else "give a number, such as 2"
        raise RequestError(f"{name}={text} is not possible", remedy=remedy, param=name)
    return number
