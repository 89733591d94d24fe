"""What stands before uvicorn's protocol: connections that idle are closed, those in use are not, and requests may queue."""

import asyncio
import json
from typing import Any

import pytest
import uvicorn
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from uni_instruct.serve.http.connections import limit_connections
from uni_instruct.serve.metrics import ServerMetrics
from uni_instruct.serve.settings import Settings

REQUEST = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"


async def answer(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("here")(scope, receive, send)


async def connected(server: uvicorn.Server) -> tuple[asyncio.AbstractServer, asyncio.StreamReader, asyncio.StreamWriter]:
    config = server.config

    def protocol() -> Any:
        return config.http_protocol_class(config=config, server_state=server.server_state, app_state={})  # type: ignore[operator]

    listening = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", listening.sockets[0].getsockname()[1])
    return listening, reader, writer


LONG = b"x" * 30_000_000


async def answer_at_length(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/piecewise":
        await StreamingResponse(iter([LONG[:1_000_000]] * 30))(scope, receive, send)
    else:
        await PlainTextResponse(LONG)(scope, receive, send)


def server_with(app: Any = answer, **settings: Any) -> uvicorn.Server:
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, http=HttpToolsProtocol))
    server.config.load()
    limit_connections(server, Settings(bundle=("digits",), **settings), ServerMetrics())
    return server


def test_a_connection_that_idles_is_closed_after_its_last_answer() -> None:
    async def work() -> None:
        listening, reader, writer = await connected(server_with(keep_alive_s=0.2))
        for _ in range(2):
            writer.write(REQUEST)
            assert (await reader.readuntil(b"here")).startswith(b"HTTP/1.1 200 OK\r\n")
        assert await reader.read() == b""  # the end: nothing more has come
        writer.close()
        listening.close()

    asyncio.run(work())


@pytest.mark.parametrize("path", [b"/", b"/piecewise"])
def test_a_client_that_takes_nothing_of_its_answer_is_let_go(path: bytes) -> None:
    async def work() -> None:
        server = server_with(answer_at_length, keep_alive_s=0.2)
        listening, _, writer = await connected(server)
        writer.transport.pause_reading()
        writer.write(REQUEST.replace(b"/", path, 1))
        while not server.server_state.total_requests and not server.server_state.tasks:
            await asyncio.sleep(0.01)
        while server.server_state.connections:
            await asyncio.sleep(0.01)
        writer.close()
        listening.close()

    asyncio.run(asyncio.wait_for(work(), 60))


@pytest.mark.parametrize("path", [b"/", b"/piecewise"])
def test_a_client_that_takes_its_answer_slowly_gets_all_of_it(path: bytes) -> None:
    async def work() -> None:
        listening, reader, writer = await connected(server_with(answer_at_length, keep_alive_s=0.5))
        writer.write(REQUEST.replace(b"/", path, 1))
        got = 0
        while got < len(LONG):
            part = await reader.read(1 << 20)
            assert part
            got += len(part)
            await asyncio.sleep(0.02)
        writer.close()
        listening.close()

    asyncio.run(work())


def test_requests_that_come_together_are_answered_one_after_the_other() -> None:
    async def work() -> None:
        listening, reader, writer = await connected(server_with(keep_alive_s=0.2))
        writer.write(3 * REQUEST)
        assert (await reader.read()).count(b"HTTP/1.1 200 OK\r\n") == 3
        writer.close()
        listening.close()

    asyncio.run(work())


def test_who_is_too_slow_is_told_what_helps() -> None:
    async def work() -> None:
        listening, reader, writer = await connected(server_with(receive_s=0.2, keep_alive_s=0.2, cors_origins="*"))
        writer.write(REQUEST[:20])
        error = refusal(await reader.read(), 408)
        assert error["message"] == "the request did not arrive completely within 0.2 s; send it again without pauses"
        assert error["code"] == "request_timeout"
        writer.close()
        again = await asyncio.open_connection("127.0.0.1", listening.sockets[0].getsockname()[1])
        again[1].write(REQUEST)
        assert b"200 OK" in await again[0].read()
        listening.close()

    asyncio.run(work())


def test_who_finds_no_connection_is_told_what_helps() -> None:
    async def work() -> None:
        free = asyncio.Event()

        async def answer_when_free(scope: Scope, receive: Receive, send: Send) -> None:
            await free.wait()
            await answer(scope, receive, send)

        server = server_with(answer_when_free, connections=4, keep_alive_s=0.2, cors_origins="*")
        listening, *first = await connected(server)
        address = ("127.0.0.1", listening.sockets[0].getsockname()[1])
        under_way = [tuple(first), *[await asyncio.open_connection(*address) for _ in range(3)]]
        for _, writer in under_way:
            writer.write(REQUEST)
        while len(server.server_state.tasks) < 4:
            await asyncio.sleep(0.01)
        refused, leaving = await asyncio.open_connection(*address)
        answered = await refused.read()
        error = refusal(answered, 503)
        assert error["message"] == "all of the server's 4 connections are in use; try again in a second"
        assert error["code"] == "too_many_connections"
        assert b"\r\nRetry-After: 1\r\n" in answered
        free.set()
        for reader, _ in under_way:
            assert b"200 OK" in await reader.read()
        again = await asyncio.open_connection(*address)
        again[1].write(REQUEST)
        assert b"200 OK" in await again[0].read()
        for _, writer in (*under_way, again):
            writer.close()
        leaving.close()
        listening.close()

    asyncio.run(asyncio.wait_for(work(), 60))


def refusal(answered: bytes, status: int) -> dict[str, Any]:
    """The error in a whole answer, which a page of any origin may read."""
    head, _, body = answered.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"\r\naccess-control-allow-origin: *" in head
    assert b"\r\ncontent-type: application/json" in head
    assert f"\r\ncontent-length: {len(body)}\r\n".encode() in head
    return dict(json.loads(body)["error"])
