"""What stands before uvicorn's protocol: connections that idle are closed, those in use are not, and requests may queue."""

import asyncio
from typing import Any

import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from uni_instruct.serve.connections import bound_connections
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


def server_with(**settings: Any) -> uvicorn.Server:
    server = uvicorn.Server(uvicorn.Config(answer, log_config=None, access_log=False, http=HttpToolsProtocol))
    server.config.load()
    bound_connections(server, Settings(bundle=("digits",), **settings), ServerMetrics())
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


def test_requests_that_come_together_are_answered_one_after_the_other() -> None:
    async def work() -> None:
        listening, reader, writer = await connected(server_with(keep_alive_s=0.2))
        writer.write(3 * REQUEST)
        assert (await reader.read()).count(b"HTTP/1.1 200 OK\r\n") == 3
        writer.close()
        listening.close()

    asyncio.run(work())
