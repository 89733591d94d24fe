"""Read the body of a request: decompress it if it is gzipped, and remove a byte-order mark."""

import zlib

from starlette.requests import ClientDisconnect, Request

from uni_instruct.errors import RequestError
from uni_instruct.serve.errors import BodyTooLargeError, EncodingError
from uni_instruct.serve.http.headers import header_of

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # Windows' editors and PowerShell put it before UTF-8
_GZIP_WINDOW = 16 + zlib.MAX_WBITS  # zlib's `wbits` for the gzip format: 16 is added to the window size


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """Return the body of a request, decompressed.

    Raises BodyTooLargeError if a gzipped body is larger than limit_bytes once decompressed, EncodingError for an encoding other
    than gzip, RequestError for a damaged gzip, and ClientDisconnect if the client leaves first. The middleware has already
    limited the bytes that are received.
    """
    body = await _received(request)
    encodings = (header_of(request.scope, b"content-encoding") or b"").decode("latin-1").lower()
    for encoding in reversed([part.strip() for part in encodings.split(",") if part.strip() not in ("", "identity")]):
        if encoding not in ("gzip", "x-gzip"):
            raise EncodingError(
                f"content encoding {encoding[:40]!r} is not supported", remedy="send the body uncompressed, or with gzip"
            )
        body = _inflate(body, limit_bytes)
    return body.removeprefix(_BYTE_ORDER_MARK)


async def _received(request: Request) -> bytes:
    """Return the body as received. Most bodies arrive in one message, for which this is faster than Starlette's `body()`."""
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
    """Decompress a gzip, but never more than limit_bytes + 1 bytes: a kilobyte of gzip can hold a megabyte of zeros."""
    parts: list[bytes] = []
    left = limit_bytes + 1
    try:
        while body:  # RFC 1952: a gzip file may consist of several streams, one after the other
            stream = zlib.decompressobj(_GZIP_WINDOW)
            parts.append(stream.decompress(body, left))
            left -= len(parts[-1])
            if left <= 0:
                raise BodyTooLargeError(
                    f"the body is larger than {limit_bytes} bytes after decompression", remedy="ask for fewer images at once"
                )
            if not stream.eof:
                raise zlib.error("it is truncated")
            body = stream.unused_data
    except zlib.error as error:
        raise RequestError(
            f"the body is not valid gzip: {error}", remedy="compress it again, or omit the header Content-Encoding"
        ) from None
    return b"".join(parts)
