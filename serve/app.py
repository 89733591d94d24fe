"""The HTTP routes, as a Starlette app that can be mounted in BentoML or run by any ASGI server."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route, compile_path
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from uni_instruct.errors import UniInstructError
from uni_instruct.serve.demo.mount import DemoMount
from uni_instruct.serve.demo.routes import DemoRoutes
from uni_instruct.serve.errors import MethodError, NotFoundError, error_response
from uni_instruct.serve.http.body import read_body
from uni_instruct.serve.http.connections import limit_connections
from uni_instruct.serve.http.disconnects import cancel_on_disconnect
from uni_instruct.serve.http.middleware import RequestMiddleware, route_path
from uni_instruct.serve.metrics import CountedApp, exposition
from uni_instruct.serve.models.registry import Models
from uni_instruct.serve.openapi import openapi_document
from uni_instruct.serve.process.shutdown import uvicorn_server
from uni_instruct.serve.routes.image_address import addressed_image, resolve_address
from uni_instruct.serve.routes.model_info import model_entry, model_info, model_list
from uni_instruct.serve.routes.openai_images import images_response, parse_images_request, resolve_images
from uni_instruct.serve.routes.responses import image_response
from uni_instruct.serve.routes.schema import parse_request, resolve
from uni_instruct.serve.routes.walk import parse_walk, resolve_walk, walk_response
from uni_instruct.serve.settings import Settings

logger = logging.getLogger(__name__)

# nginx's status for a client that has disconnected. No client receives it; it separates these requests in the metrics.
CLIENT_LEFT = 499

Handler = Callable[[Models, Request], Awaitable[Response]]


def create_app(settings: Settings) -> Starlette:
    """Create the app. It answers requests at once and loads the generators in its lifespan; /readyz says when it is ready.

    Raises RequestError if two of the settings' bundles have the same name. `app.state.models` and `app.state.guards` are for
    the BentoML service.
    """
    models = Models(settings)
    demo, demo_routes = DemoMount(models), DemoRoutes()
    guards = request_middleware_of(models)
    app = Starlette(
        routes=_routes(models, demo, demo_routes),
        middleware=[guards],
        lifespan=_lifespan(models, demo, demo_routes),
        exception_handlers={HTTPException: _counted_exception(models)},
    )
    app.state.models, app.state.guards = models, guards
    return app


def request_middleware_of(models: Models) -> Middleware:
    """Return the middleware for this app and for the app that it is mounted in, with direct access to routes of fixed path."""
    direct = {
        (method, path): _app_of(_endpoint(models, handler, path)) for method, path, handler in _HANDLERS if "{" not in path
    }
    return Middleware(
        RequestMiddleware, settings=models.settings, metrics=models.metrics, stopping=models.stopping, direct=direct
    )


def _routes(models: Models, demo: DemoMount, demo_routes: DemoRoutes) -> list[BaseRoute]:
    routes: list[BaseRoute] = [
        Route(path, _endpoint(models, handler, path), methods=[method]) for method, path, handler in _HANDLERS
    ]
    if models.settings.serves_ui:
        routes += [
            Route(path, _endpoint(models, handler, path), methods=[method]) for method, path, handler in demo_routes.handlers
        ]
        page = CountedApp(demo, "/ui", models.metrics)
        routes += [Route("/ui", page), Route("/ui/{path:path}", page)]
    # Swagger UI's files as shipped with BentoML, so that /docs loads nothing from other hosts.
    swagger = StaticFiles(packages=[("bentoml", "_internal/server/static_content")])
    routes.append(Mount("/static_content", CountedApp(swagger, "/static_content", models.metrics)))
    # Last, because routes are tried in order. All unknown paths share one label, or the metrics would grow with every new path.
    routes.append(Route("/{path:path}", _endpoint(models, _unknown, "unknown"), methods=_METHODS))
    return routes


def _lifespan(models: Models, demo: DemoMount, demo_routes: DemoRoutes) -> Callable[[Starlette], Any]:
    async def load() -> None:
        await models.load()
        # Start the demo before the server is ready: importing Gradio takes seconds and would slow down the first requests.
        if models.alive and models.settings.serves_ui:
            await demo.start()
        models.mark_ready()
        await models.watch()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if server := uvicorn_server():
            limit_connections(server, models.settings, models.metrics)
            models.stopping.watch(server, models.fail_waiting)
        # Load in the background, so that the server answers /livez meanwhile. Otherwise an orchestrator would take it for dead.
        loading = asyncio.create_task(load())
        yield
        loading.cancel()
        await demo.stop()
        await demo_routes.close()
        await models.close()

    return lifespan


async def _generate(models: Models, request: Request) -> Response:
    wanted = parse_request(await read_body(request, models.settings.max_body_bytes))
    with models.using(wanted.model) as served:
        job = resolve(wanted, served.spec, models.settings.request_images)
        return await cancel_on_disconnect(request.scope, request.receive, image_response(served, job))


async def _walk(models: Models, request: Request) -> Response:
    wanted = parse_walk(await read_body(request, models.settings.max_body_bytes))
    with models.using(wanted.model) as served:
        job = resolve_walk(wanted, served.spec, models.settings.request_images, served.engine.mixes_classes)
        return await cancel_on_disconnect(request.scope, request.receive, walk_response(served, job))


async def _openai_images(models: Models, request: Request) -> Response:
    wanted = parse_images_request(await read_body(request, models.settings.max_body_bytes))
    with models.using(wanted.model) as served:
        job = resolve_images(wanted, served.spec, models.settings.request_images)
        return await cancel_on_disconnect(request.scope, request.receive, images_response(served, job, str(request.base_url)))


async def _image(models: Models, request: Request) -> Response:
    with models.using(request.path_params["model"]) as served:
        address = resolve_address(request.path_params["file"], request.query_params, served)
        return await cancel_on_disconnect(request.scope, request.receive, addressed_image(served, address, request.headers))


async def _models(models: Models, request: Request) -> Response:
    return JSONResponse(model_list(models))


async def _model(models: Models, request: Request) -> Response:
    return JSONResponse(model_entry(models.get(request.path_params["model"])))


async def _spec(models: Models, request: Request) -> Response:
    return JSONResponse(model_info(models.get(request.query_params.get("model"))))


async def _openapi(models: Models, request: Request) -> Response:
    return JSONResponse(openapi_document(demo=models.settings.serves_ui))


async def _metrics(models: Models, request: Request) -> Response:
    await asyncio.sleep(0)  # let pending callbacks run, in which earlier answers record their times (`record_stages`)
    # In a thread, because with several workers it reads files of all of them.
    text = await asyncio.to_thread(exposition, models.metrics, models.settings.workers)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def _livez(models: Models, request: Request) -> Response:
    return PlainTextResponse("alive\n") if models.alive else PlainTextResponse("not alive\n", 503)


async def _readyz(models: Models, request: Request) -> Response:
    # Only names and states, because this route needs no key. /v1/spec says why a model could not be loaded.
    lines = ["ready" if models.ready else "not ready", *(f"{name}: {state}" for name, state in models.states.items())]
    return PlainTextResponse("\n".join(lines) + "\n", 200 if models.ready else 503)


async def _index(models: Models, request: Request) -> Response:
    page = _page("index.html")
    return HTMLResponse(page if models.settings.serves_ui else page.replace('data-ui="on"', 'data-ui="off"'))


async def _docs(models: Models, request: Request) -> Response:
    return HTMLResponse(_page("docs.html"))


async def _icon(models: Models, request: Request) -> Response:
    return Response(_page("icon.svg"), media_type="image/svg+xml")


async def _unknown(models: Models, request: Request) -> Response:
    path = route_path(request.scope)
    allowed = [method for method, pattern, _ in _HANDLERS if compile_path(pattern)[0].match(path)]
    raise HTTPException(405, headers={"Allow": ", ".join(allowed)}) if allowed else HTTPException(404)


_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD"]

_HANDLERS: list[tuple[str, str, Handler]] = [
    ("POST", "/v1/generate", _generate),
    ("POST", "/v1/images/generations", _openai_images),
    ("GET", "/v1/images/{model}/{file}", _image),
    ("POST", "/v1/walk", _walk),
    ("GET", "/v1/models", _models),
    ("GET", "/v1/models/{model}", _model),
    ("GET", "/v1/spec", _spec),
    ("GET", "/livez", _livez),
    ("GET", "/healthz", _livez),
    ("GET", "/readyz", _readyz),
    ("GET", "/metrics", _metrics),
    ("GET", "/openapi.json", _openapi),
    ("GET", "/docs", _docs),
    ("GET", "/favicon.ico", _icon),
    ("GET", "/", _index),
]


def _endpoint(models: Models, handler: Handler, route: str) -> Callable[[Request], Awaitable[Response]]:
    """Wrap a handler: its errors become error responses, and all responses are counted under `route`.

    No exception may leave it, because BentoML would close the connection without an answer.
    """

    async def endpoint(request: Request) -> Response:
        response = await _handled(models, handler, request)
        models.metrics.count_answer(route, response.status_code)
        return response

    return endpoint


def _app_of(endpoint: Callable[[Request], Awaitable[Response]]) -> ASGIApp:
    """Make an ASGI app of an endpoint, without Starlette's error handling, which `_endpoint` makes unnecessary."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)

    return app


async def _handled(models: Models, handler: Handler, request: Request) -> Response:
    try:
        return await handler(models, request)
    except UniInstructError as error:
        return error_response(error)
    except HTTPException as error:
        return await _http_exception(request, error)
    except ClientDisconnect:
        return Response(status_code=CLIENT_LEFT)
    except Exception:
        logger.exception("%s %s failed", request.method, request.url.path)
        return error_response(UniInstructError("internal error", remedy="see the server's log"))


def _counted_exception(models: Models) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Return a handler for errors that Starlette raises outside the endpoints, such as an unsupported method."""

    async def answer(request: Request, error: Exception) -> Response:
        response = await _http_exception(request, error)
        models.metrics.count_answer("unknown", response.status_code)
        return response

    return answer


async def _http_exception(request: Request, error: Exception) -> Response:
    """Turn Starlette's own errors (unknown path, unsupported method) into error responses of this project."""
    assert isinstance(error, HTTPException)
    headers = error.headers or {}
    if error.status_code == 405:
        problem = f"{request.url.path} does not support {request.method}"
        response = error_response(MethodError(problem, remedy=f"use {headers.get('Allow', 'GET')}"))
    else:
        response = error_response(NotFoundError(f"there is no {request.url.path}", remedy="/docs lists the routes"))
    response.headers.update(headers)
    return response


def _page(name: str) -> str:
    return (files("uni_instruct.serve") / "pages" / name).read_text()
