"""GET /v1/images/{model}/{seed}.png: one image by its address, for <img> tags and caches."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from starlette.datastructures import Headers, QueryParams
from starlette.responses import Response

from uni_instruct.errors import RequestError
from uni_instruct.generate import resolve_class_ids
from uni_instruct.noise import SEED_LIMIT
from uni_instruct.serve.errors import NotFoundError
from uni_instruct.serve.models.served_model import ServedModel
from uni_instruct.serve.routes.picture import PICTURE_FORMATS, Picture, size_factor
from uni_instruct.serve.routes.responses import generate_encoded, timing_headers
from uni_instruct.spec import ModelSpec

# Only ASCII digits without leading zeros: other spellings of a seed would be more addresses of the same image.
_FILE = re.compile(rf"(0|[1-9][0-9]{{0,18}})\.({'|'.join(PICTURE_FORMATS)})")
_QUERY = {"class": "a class by name or id", "size": "such as 256x256", "weights": "the beginning of the weights' sha256"}
# max-age of an answer. If a bundle is replaced, an address without `weights` gets other images, and caches may serve old ones
# beside new ones for up to a day. An address with `weights` always means the same image.
_DAY_S, _YEAR_S = 86_400, 31_536_000
_MIN_DIGITS = 8  # of the weights' sha256


@dataclass(frozen=True)
class ImageAddress:
    """A checked address. class_ids: int64 [1], None for an unconditional generator. pinned: whether it names the weights."""

    seed: int
    class_ids: np.ndarray | None
    picture: Picture
    pinned: bool


def resolve_address(file: str, query: QueryParams, served: ServedModel) -> ImageAddress:
    """Parse 'SEED.FORMAT' and the query. Raises NotFoundError for an unknown file or weights, RequestError for a bad query."""
    match = _FILE.fullmatch(file)
    if not match or int(match[1]) >= SEED_LIMIT:
        raise NotFoundError(
            f"there is no image {file[:60]!r}",
            remedy=f"name a seed in [0, 2**63) and a format: 7.png ({', '.join(PICTURE_FORMATS)})",
        )
    _check_query(query)
    class_ids = _class_ids(served.spec, int(match[1]), query.get("class"))
    weights = query.get("weights")
    if weights is not None:
        _check_weights(weights, served.bundle.weights_sha256)
    picture = Picture(PICTURE_FORMATS[match[2]], size_factor(query.get("size"), served.spec))
    return ImageAddress(int(match[1]), class_ids, picture, pinned=weights is not None)


async def addressed_image(served: ServedModel, address: ImageAddress, headers: Headers) -> Response:
    """Return the image, or 304 without a body if the client has it already (If-None-Match). A 304 does not use the engine."""
    cache = cache_headers(served, address)
    # A header with a list may be repeated; its lines are then one list (RFC 9110, section 5.3).
    if _etag_matches(",".join(headers.getlist("if-none-match")), cache["ETag"]):
        return Response(status_code=304, headers=cache)
    encoded = await generate_encoded(
        served,
        [address.seed],
        address.class_ids,
        lambda images: [address.picture.encode(images[0])],
        address.picture.format,
        address.picture.factor,
    )
    told = {"X-Seeds": str(address.seed), **timing_headers(served, encoded.stage_ms), **cache}
    if address.class_ids is not None:
        told["X-Class-Ids"] = str(address.class_ids[0])
    return Response(encoded.files[0], headers=told, media_type=f"image/{address.picture.format}")


def cache_headers(served: ServedModel, address: ImageAddress) -> Mapping[str, str]:
    """Return ETag (weights' hash and engine) and Cache-Control: a year if the address pins the weights, otherwise a day."""
    # With API keys, shared caches must not store images, because they would serve them to clients without a key.
    who = "private" if served.settings.keys else "public"
    age = _YEAR_S if address.pinned else _DAY_S
    return {
        "ETag": f'"{served.bundle.weights_sha256[:16]}-{served.engine.id}"',
        "Cache-Control": f"{who}, max-age={age}, immutable",
    }


def _etag_matches(if_none_match: str, etag: str) -> bool:
    """Whether one of the listed tags is ours. If-None-Match ignores the prefix 'W/' (RFC 9110, section 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


def _class_ids(spec: ModelSpec, seed: int, label: str | None) -> np.ndarray | None:
    try:
        return resolve_class_ids(spec, [seed], None if label is None else [label])
    except RequestError as error:
        error.param = "class"  # the name of this route's parameter
        raise


def _check_query(query: QueryParams) -> None:
    for name in query:
        if name not in _QUERY:
            fields = ", ".join(f"{field} ({meaning})" for field, meaning in _QUERY.items())
            raise RequestError(f"parameter {name[:40]!r} is unknown", remedy=f"the parameters are {fields}", param=name[:40])
        if len(query.getlist(name)) > 1:
            raise RequestError(f"parameter {name} is given twice", remedy="give it once", param=name)


def _check_weights(wanted: str, sha256: str) -> None:
    if len(wanted) < _MIN_DIGITS or not re.fullmatch(r"[0-9a-f]*", wanted):
        raise RequestError(
            f"weights {wanted[:40]!r} are not {_MIN_DIGITS} or more lower-case hexadecimal digits",
            remedy=f"give the first {_MIN_DIGITS} or more digits of weights_sha256 in /v1/spec",
            param="weights",
        )
    if not sha256.startswith(wanted):
        raise NotFoundError(
            f"the weights {wanted[:64]} are not served", remedy=f"give the current ones, which begin with {sha256[:16]}"
        )
