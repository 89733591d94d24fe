"""The HTTP app in this process, and clients of it."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette

from uni_instruct.bundle import Bundle
from uni_instruct.serve.app import create_app
from uni_instruct.serve.settings import Settings

FOREVER_S = 60.0


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, FOREVER_S))


def app_of(*sources: str | Path | Bundle, **settings: Any) -> Starlette:
    """The server of these generators, with torch and without the demo unless the settings say otherwise."""
    bundle = tuple(str(source.path if isinstance(source, Bundle) else source) for source in sources)
    return create_app(Settings(**{"bundle": bundle, "engine": "torch", "ui": False, **settings}))


@asynccontextmanager
async def client_of(app: Starlette, *, wait: bool = True) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://server", timeout=FOREVER_S) as client,
    ):
        while wait and (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.01)
        yield client


async def metric(client: httpx.AsyncClient, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
