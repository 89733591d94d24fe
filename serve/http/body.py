"""The body of a request as it was meant: inflated where it came gzipped, and without a byte-order mark."""

import zlib

from starlette.requests import ClientDisconnect, Request

from uni_instruct.errors import RequestError
from uni_instruct.serve.errors import BodyTooLargeError, EncodingError
from uni_instruct.serve.http.headers import header_of

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows' editors and PowerShell put it before UTF-8
_GZIP_WINDOW = 16 + zlib.MAX_WBITS


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """The body, at most limit_bytes of it once inflated.

    Raises BodyTooLargeError above that, EncodingError for an encoding other than gzip, RequestError for a broken gzip.
    """
    body = await _received(request)
    encodings = (header_of(request.scope, b"content-encoding") or b"").decode("latin-1").lower()
    for encoding in reversed([part.strip() for part in encodings.split(",") if part.strip() not in ("", "identity")]):
        if encoding not in ("gzip", "x-gzip"):
            raise EncodingError(f"content encoding {encoding[:40]!r} is unknown", remedy="send the body plain, or with gzip")
        body = _inflate(body, limit_bytes)
    return body.removeprefix(_BYTE_ORDER_MARK)


async def _received(request: Request) -> bytes:
    """The body as it came. Most come in one piece, for which Starlette's own way is a long one."""
    message = await request.receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        return bytes(message.get("body", b""))
    parts: list[bytes] = []
    while message["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)
        message = await request.receive()
    raise ClientDisconnect


def _inflate(body: bytes, limit_bytes: int) -> bytes:
    """What was gzipped. No more than limit_bytes + 1 are ever inflated: a kilobyte may hold a megabyte of zeros."""
    parts: list[bytes] = []
    left = limit_bytes + 1
    try:
        while body:  # several gzip streams in a row are one, by RFC 1952
            stream = zlib.decompressobj(_GZIP_WINDOW)
            parts.append(stream.decompress(body, left))
            left -= len(parts[-1])
            if left <= 0:
                raise BodyTooLargeError(
                    f"the body is larger than {limit_bytes} bytes once inflated", remedy="ask for fewer images at once"
                )
            if not stream.eof:
                raise zlib.error("it ends early")
            body = stream.unused_data
    except zlib.error as error:
        raise RequestError(f"the body is no gzip: {error}", remedy="gzip it anew, or leave Content-Encoding out") from None
    return b"".join(parts)
