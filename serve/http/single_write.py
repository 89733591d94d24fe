"""Send a complete answer in a single write. Uvicorn's own code goes through every header twice and writes twice."""

from starlette.types import Message, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from uni_instruct.serve.http.headers import value_of

Headers = list[tuple[bytes, bytes]]


def single_write(send: Send) -> Send:
    """Wrap uvicorn's `send`: an answer whose body is complete goes out in one write, others as before.

    A `send` of another server is returned unchanged.
    """
    cycle = getattr(send, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle):
        return send
    held: Message | None = None

    async def send_whole(message: Message) -> None:
        nonlocal held
        # Hold the start back only if there is a Content-Length. Streams have none, and their headers must go out at once.
        if message["type"] == "http.response.start" and value_of(message["headers"], b"content-length") is not None:
            held = message
            return
        start, held = held, None
        if cycle.transport.is_closing():
            # Of several pipelined requests uvicorn marks only the last one as disconnected, and would write for the others.
            cycle.disconnected = True
        if start is not None:
            if _written(cycle, start, message):
                return
            await send(start)
        await send(message)

    return send_whole


def _written(cycle: RequestResponseCycle, start: Message, message: Message) -> bool:
    """Write the answer and return True if it is an ordinary one. Return False, without writing, to leave it to uvicorn."""
    body: bytes = message.get("body", b"")
    headers: Headers = cycle.default_headers + list(start["headers"])
    usual = cycle.keep_alive and cycle.scope["method"] != "HEAD" and not cycle.access_log
    free = not (cycle.disconnected or cycle.flow.write_paused or cycle.response_started)
    whole = not message.get("more_body") and value_of(headers, b"content-length") == str(len(body)).encode()
    if not (usual and free and whole) or value_of(headers, b"connection") is not None:
        return False
    head = b"".join([STATUS_LINE[start["status"]], *[b"%b: %b\r\n" % header for header in headers], b"\r\n"])
    # A header value with a line break in it (header injection): uvicorn refuses it.
    if not head.count(b"\r") == head.count(b"\n") == len(headers) + 2 or b"\0" in head:
        return False
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    cycle.transport.write(head + body)
    cycle.message_event.set()
    cycle.on_response()
    return True
