"""Nothing stays behind of a client that has gone, however it went: not a connection, task, timer, request or error.

On uvicorn's real server and sockets. The garbage collector is off: what waits for it waits for thousands of other clients, and
then stops the event loop for as long as it takes to free all of them at once.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, get_args

import pytest
import uvicorn
import uvloop
from pydantic import BaseModel, ValidationError

from builders.growth import alive, grown, without_collector
from builders.serving import FOREVER_S, app_of
from uni_instruct.serve.demo.compare import CompareRequest
from uni_instruct.serve.routes.openai_images import ImagesRequest
from uni_instruct.serve.routes.schema import GenerateRequest
from uni_instruct.serve.routes.walk import WalkRequest

CLIENTS = 40
OURS = ("uni_instruct.", "httptools.", "uvloop.loop.TimerHandle")
Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def get(path: str, headers: str = "") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: here\r\n{headers}\r\n".encode()


def post(path: str, **fields: object) -> bytes:
    body = json.dumps(fields).encode()
    return f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


IMAGES = post("/v1/generate", num_images=20, format="npz")
WEBSOCKET = get(
    "/v1/generate",
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
)


def leaves_after(data: bytes) -> Client:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await writer.drain()

    return client


def waits_after(data: bytes) -> Client:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await reader.readuntil(b"\r\n\r\n")

    return client


def stays_after(data: bytes) -> Client:
    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await reader.read()  # until the server closes

    return client


async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(IMAGES)
    await asyncio.sleep(0)
    writer.transport.abort()


CLIENTS_OF = {
    "answered": waits_after(get("/livez")),
    "images": waits_after(IMAGES),
    "described": waits_after(get("/v1/spec")),
    "refused": waits_after(post("/v1/generate", num_images=41)),
    "wrong": waits_after(post("/v1/generate", seeds="x")),
    "nowhere": waits_after(get("/nowhere")),
    "no HTTP": stays_after(b"\x16\x03\x01\x02\x00\r\n\r\n"),
    "websocket": stays_after(WEBSOCKET),
    "hangs up": leaves_after(IMAGES),
    "resets": resets,
    "half a body": leaves_after(IMAGES[:-9]),
    "half a head": leaves_after(IMAGES[:30]),
    "many at once": leaves_after(5 * IMAGES),
    "silent": leaves_after(b""),
}


async def come_and_go(server: uvicorn.Server, client: Client) -> None:
    """So many clients one after the other; at the end the server has nobody left."""
    port = server.servers[0].sockets[0].getsockname()[1]
    for _ in range(CLIENTS):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await client(reader, writer)
        writer.close()
    while server.server_state.connections or server.server_state.tasks:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)  # the engine's last batch, and the clients' own ends


def test_a_client_that_has_gone_leaves_nothing(caplog: pytest.LogCaptureFixture) -> None:
    for name in ("", "uvicorn.error"):  # what is logged is kept, and other tests may have set a level of their own
        caplog.set_level(logging.ERROR, logger=name)

    async def work() -> dict[str, dict[str, int]]:
        app = app_of("digits", engine="onnx", request_images=40, queue_images=40)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, http="httptools"))
        serving = asyncio.create_task(server.serve())
        while not (server.started and app.state.models.ready):
            await asyncio.sleep(0.01)
        left = {}
        for kind in ("answered", *CLIENTS_OF):  # the first of all makes what the counting itself needs, once
            client = CLIENTS_OF[kind]
            await come_and_go(server, client)  # and this what such a client needs
            with without_collector():
                before = alive()
                await come_and_go(server, client)
                left[kind] = grown(before, CLIENTS)
        # The library of websockets has circles of its own, which end with the collector.
        left["websocket"] = {name: count for name, count in left["websocket"].items() if name.startswith(OURS)}
        server.should_exit = True
        await serving
        return left

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(asyncio.wait_for(work(), FOREVER_S)) == {kind: {} for kind in CLIENTS_OF}
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("model", [GenerateRequest, ImagesRequest, WalkRequest, CompareRequest])
def test_of_a_long_list_that_is_wrong_one_item_is_described(model: type[BaseModel]) -> None:
    """Twenty thousand descriptions took 20 ms of the event loop, in which nobody was answered."""
    needed: dict[str, Any] = {"seeds": [1, 2], "other": "teacher"}
    for name, field in model.model_fields.items():
        if any("list[" in str(kind) for kind in (field.annotation, *get_args(field.annotation))):
            given = {key: value for key, value in needed.items() if key in model.model_fields}
            with pytest.raises(ValidationError) as caught:
                model.model_validate({**given, name: [None] * 20_000})
            described = caught.value.errors()
            assert {error["loc"][1] for error in described} == {0}, name
