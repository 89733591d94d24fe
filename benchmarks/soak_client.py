"""HTTP by hand, for clients that do what HTTP libraries do not let them: leave in the middle, and send garbage."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

_PATIENCE_S = 60.0
_LOOK_EVERY_S = 0.005


@dataclass(frozen=True)
class Reply:
    """What came back; status is 0 where nothing did. Times by time.perf_counter."""

    status: int
    body: bytes
    start: float
    end: float

    @property
    def took_ms(self) -> float:
        return 1e3 * (self.end - self.start)


class Wire:
    """One connection, opened when it is first needed, and again after it was closed."""

    def __init__(self, port: int):
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def get(self, path: str) -> Reply:
        return await self._exchange(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    async def post(self, path: str, body: bytes) -> Reply:
        return await self._exchange(_post(path, body))

    async def hang_up(self, body: bytes, after_s: float) -> None:
        """Asks for images, and closes the connection before they may be there."""
        with contextlib.suppress(OSError):
            _, writer = await self._open()
            writer.write(_post("/v1/generate", body))
            await asyncio.sleep(after_s)
        self.close()

    async def raw(self, data: bytes, half_close: bool = False, leave_after_s: float = _PATIENCE_S) -> Reply:
        """These bytes, and whatever comes until the server closes or patience ends. half_close: nothing more will be sent."""
        start, received = time.perf_counter(), b""
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(leave_after_s):
                reader, writer = await self._open()
                writer.write(data)
                if half_close:
                    writer.write_eof()
                while part := await reader.read(1 << 16):
                    received += part
        self.close()
        words = received[:16].split(b" ")
        status = int(words[1]) if received.startswith(b"HTTP/1.") and words[1].isdigit() else 0
        return Reply(status, received, start, time.perf_counter())

    async def _exchange(self, data: bytes) -> Reply:
        start = time.perf_counter()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                status, body, stays = await self._answer(data)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self.close()
            return Reply(0, repr(error).encode(), start, time.perf_counter())
        if not stays:
            self.close()
        return Reply(status, body, start, time.perf_counter())

    async def _answer(self, data: bytes) -> tuple[int, bytes, bool]:
        reader, writer = await self._open()
        writer.write(data)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"transfer-encoding: chunked" in head:
            body = b""
            while size := int(await reader.readuntil(b"\r\n"), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readexactly(2)
        else:
            body = await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r")[0] or 0))
        return int(head.split(b" ", 2)[1]), body, b"connection: close" not in head

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        # As every client does: a connection that has been closed while it was idle is not asked.
        if self._streams is not None and self._streams[0].at_eof():
            self.close()
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        return self._streams


class Lag:
    """By how much this process was late: on a shared machine its own delays are not to be taken for the server's."""

    def __init__(self) -> None:
        self.all_ms: list[float] = []
        self._recent: deque[tuple[float, float]] = deque(maxlen=round(_PATIENCE_S / _LOOK_EVERY_S))

    async def measure(self) -> None:
        """For ever."""
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_LOOK_EVERY_S)
            now = time.perf_counter()
            late_ms = 1e3 * (now - before - _LOOK_EVERY_S)
            self._recent.append((now, late_ms))
            self.all_ms.append(late_ms)

    def worst_ms(self, start: float, end: float) -> float:
        """The longest delay that began or ended in that time, or goes on at its end."""
        if not self._recent:
            return 0.0
        worst = max(0.0, 1e3 * (end - self._recent[-1][0] - _LOOK_EVERY_S))
        for at, late_ms in reversed(self._recent):
            if at < start:
                break
            worst = max(worst, late_ms)
        return worst


def waited_for_cpu_ms(process: int, threads: Iterable[int]) -> float:
    """How long these threads of a process have waited for processors that others had; 0 where the kernel does not say."""
    waited = 0.0
    for thread in threads:
        with contextlib.suppress(OSError, IndexError):
            waited += float(Path(f"/proc/{process}/task/{thread}/schedstat").read_text().split()[1]) / 1e6
    return waited


def _post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
