"""Routes that only the demo's page needs: the model card, its pictures, and comparisons."""

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from uni_instruct.serve.demo.about import PICTURES, about
from uni_instruct.serve.demo.compare import CompareRequest, SideBySide
from uni_instruct.serve.errors import NotFoundError
from uni_instruct.serve.http.body import read_body
from uni_instruct.serve.models.registry import Models
from uni_instruct.serve.routes.schema import field_remedies, parse_model


class DemoRoutes:
    """The handlers of these routes, with the engines that comparisons have opened."""

    def __init__(self) -> None:
        self._side_by_side = SideBySide()
        self.handlers: list[tuple[str, str, Callable[[Models, Request], Awaitable[Response]]]] = [
            ("GET", "/v1/about", self._about),
            ("GET", "/v1/about/{picture}", self._picture),
            ("POST", "/v1/compare", self._compare),
        ]

    async def close(self) -> None:
        """Close the engines of comparisons, after the running call."""
        await asyncio.to_thread(self._side_by_side.close)

    async def _about(self, models: Models, request: Request) -> Response:
        with models.using(request.query_params.get("model")) as served:
            return JSONResponse(await asyncio.to_thread(about, served))

    async def _picture(self, models: Models, request: Request) -> Response:
        name = request.path_params["picture"]
        path = models.get(request.query_params.get("model")).bundle.path / name
        if name not in PICTURES or not path.is_file():
            raise NotFoundError(f"there is no picture {name[:60]}", remedy="GET /v1/about lists the pictures")
        return FileResponse(path, media_type="image/png", headers={"Cache-Control": "no-cache"})

    async def _compare(self, models: Models, request: Request) -> Response:
        body = await read_body(request, models.settings.max_body_bytes)
        wanted = parse_model(CompareRequest, body, field_remedies(CompareRequest), example='{"other": "teacher", "seeds": [7]}')
        with models.using(wanted.model) as served:
            return JSONResponse(await self._side_by_side.run(served, wanted))
