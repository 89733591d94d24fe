"""Answers in one write: to the byte what uvicorn makes of them, and left to it where it would refuse them or wait."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from uni_instruct.serve.http.single_write import single_write

Messages = list[dict[str, Any]]
DEFAULTS = [(b"server", b"uvicorn"), (b"date", b"Sun, 29 Nov 2026 00:00:00 GMT")]


class Wire(asyncio.Transport):
    """Keeps what is written to a client."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def answering(messages: Messages, wrap: Callable[[Send], Send]) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        send = wrap(send)
        for message in messages:
            await send(message)

    return app


def served(messages: Messages, wrap: Callable[[Send], Send], method: str = "GET", version: str = "1.1") -> Wire:
    """What goes over the wire for one request."""

    async def work() -> Wire:
        config = uvicorn.Config(answering(messages, wrap), log_config=None, access_log=False)
        config.load()
        state = ServerState()
        state.default_headers = DEFAULTS
        protocol, wire = HttpToolsProtocol(config=config, server_state=state, app_state={}), Wire()
        protocol.connection_made(wire)
        protocol.data_received(f"{method} / HTTP/{version}\r\nHost: here\r\n\r\n".encode())
        while state.tasks:
            await asyncio.sleep(0)
        wire.closed = True
        protocol.connection_lost(None)
        return wire

    return asyncio.run(work())


def start(status: int = 200, **headers: str) -> dict[str, Any]:
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": named}


def body(data: bytes = b"pixels", **more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, **more}


WHOLE = [start(content_length="6", x_seeds="7"), body()]


@pytest.mark.parametrize(
    ("messages", "method", "version"),
    [
        pytest.param(WHOLE, "GET", "1.1", id="whole"),
        pytest.param(WHOLE, "HEAD", "1.1", id="head"),
        pytest.param(WHOLE, "GET", "1.0", id="http-1.0"),
        pytest.param([start(404, content_length="6"), body()], "GET", "1.1", id="error"),
        pytest.param([start(304), body(b"")], "GET", "1.1", id="not-modified"),
        pytest.param([start(413, content_length="6", connection="close"), body()], "POST", "1.1", id="closing"),
        pytest.param([start(content_length="6"), body(b"pix", more_body=True), body(b"els")], "GET", "1.1", id="two-parts"),
        pytest.param([start(), body(b"event", more_body=True), body(b"")], "GET", "1.1", id="stream"),
        pytest.param([start(content_length="7"), body()], "GET", "1.1", id="too-short"),
        pytest.param([start(content_length="5"), body()], "GET", "1.1", id="too-long"),
        pytest.param([start(content_length="6", x_name="a\r\nset-cookie: b"), body()], "GET", "1.1", id="line-in-a-value"),
        pytest.param([start(content_length="6", x_name="a\nb"), body()], "GET", "1.1", id="newline-in-a-value"),
        pytest.param([start(content_length="6")], "GET", "1.1", id="no-body"),
    ],
)
def test_the_wire_cannot_tell(messages: Messages, method: str, version: str) -> None:
    ours, theirs = served(messages, single_write, method, version), served(messages, lambda send: send, method, version)
    if messages[-1]["type"] == "http.response.start":
        # Uvicorn has sent the head and can only hang up; held back, it makes room for an answer that says what is wrong.
        assert b"".join(ours.writes).startswith(b"HTTP/1.1 500 ")
        return
    assert b"".join(ours.writes).split(b"\r\n") == b"".join(theirs.writes).split(b"\r\n")


def test_an_answer_is_one_write() -> None:
    assert len(served(WHOLE, single_write).writes) == 1
    assert len(served(WHOLE, lambda send: send).writes) == 2


def test_the_head_of_a_stream_does_not_wait() -> None:
    seen: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        whole = single_write(send)
        await whole(start())
        seen.append(scope_writes())
        await whole(body(b""))

    def scope_writes() -> int:
        return len(wire.writes)

    wire = Wire()

    async def work() -> None:
        config = uvicorn.Config(app, log_config=None, access_log=False)
        config.load()
        protocol = HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
        protocol.connection_made(wire)
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        while not seen:
            await asyncio.sleep(0)
        wire.closed = True
        protocol.connection_lost(None)

    asyncio.run(work())
    assert seen == [1]
