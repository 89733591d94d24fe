"""The body of POST /v1/generate as a pydantic model, and how it becomes seeds and classes."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from uni_instruct.errors import RequestError
from uni_instruct.generate import resolve_class_ids
from uni_instruct.images import IMAGE_FORMATS
from uni_instruct.spec import ModelSpec

ResponseFormat = Literal["png", "jpeg", "webp", "npz", "zip", "json"]

# Drawn seeds stay below what JavaScript's numbers hold exactly.
_DRAWN_SEED_LIMIT = 2**53


class GenerateRequest(BaseModel):
    """The body of POST /v1/generate. All fields are optional: an empty object makes one image."""

    # Strict: a misspelled field or a seed of 7.0 is refused, where a lenient reader would make images nobody asked for.
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="Which of the generators that are served; without it the first.")
    seeds: list[int] | None = Field(None, description="One image for each; integers in [0, 2**63).", examples=[[7, 8]])
    num_images: int | None = Field(None, description="Instead of seeds: how many, with seeds drawn by the server.")
    class_ids: list[int] | None = Field(None, description="One for all images, or one for each.")
    classes: list[str] | None = Field(None, description="The same by name.")
    format: ResponseFormat | None = Field(None, description="png for one image or a grid, json for several, unless given.")
    grid: bool = Field(False, description="All images in one picture.")


@dataclass(frozen=True)
class Job:
    """A request that has been checked and can be run. class_ids: int64 [N], None for an unconditional generator."""

    seeds: list[int]
    class_ids: np.ndarray | None
    format: str
    grid: bool


def parse_request(body: bytes) -> GenerateRequest:
    """The request in a JSON body; an empty body is the default request. Raises RequestError for any other body."""
    try:
        return GenerateRequest.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise _request_error(error) from None


def resolve(request: GenerateRequest, spec: ModelSpec, limit: int) -> Job:
    """Seeds and classes of a request, of at most `limit` images. Raises RequestError."""
    seeds = _seeds(request, limit)
    if request.class_ids is not None and request.classes is not None:
        raise RequestError("both class_ids and classes are given", remedy="give one of them", param="classes")
    labels: Sequence[int | str] | None = request.class_ids if request.class_ids is not None else request.classes
    if labels is not None and not labels:
        raise RequestError("the list of classes is empty", remedy="name one, or leave it out", param="classes")
    class_ids = resolve_class_ids(spec, seeds, labels)
    return Job(seeds, class_ids, _format(request, len(seeds)), request.grid)


def draw_seeds(count: int) -> list[int]:
    """Consecutive seeds from a random first one, so that X-Seeds can name them all as one short range."""
    first = secrets.randbelow(_DRAWN_SEED_LIMIT - count)
    return list(range(first, first + count))


def _seeds(request: GenerateRequest, limit: int) -> list[int]:
    if request.seeds is not None and request.num_images is not None:
        raise RequestError("both seeds and num_images are given", remedy="give one of them", param="num_images")
    # The error names the field that the client wrote.
    param = "num_images" if request.seeds is None else "seeds"
    count = len(request.seeds) if request.seeds is not None else request.num_images
    count = 1 if count is None else count
    if not 1 <= count <= limit:
        raise RequestError(f"{count} images were asked for", remedy=f"ask for 1 to {limit} in one request", param=param)
    return draw_seeds(count) if request.seeds is None else request.seeds


def _format(request: GenerateRequest, count: int) -> str:
    several = count > 1 and not request.grid
    chosen = request.format or ("json" if several else "png")
    if several and chosen in IMAGE_FORMATS:
        raise RequestError(
            f"{count} images do not fit one {chosen}",
            remedy='set "grid": true, or choose the format zip, npz or json',
            param="format",
        )
    if request.grid and chosen not in IMAGE_FORMATS:
        raise RequestError(
            f"a grid is one picture, and {chosen} is none",
            remedy=f"choose the format {', '.join(IMAGE_FORMATS)}, or leave grid out",
            param="grid",
        )
    return chosen


# Field -> what it must look like.
_REMEDIES = {
    "model": "give the name of a model, as GET /v1/models lists them",
    "seeds": "give a list of integers, such as [7, 8]",
    "num_images": "give an integer, such as 4",
    "class_ids": "give a list of integers, such as [3]",
    "classes": 'give a list of names, such as ["3"]',
    "format": f"choose one of {', '.join(get_args(ResponseFormat))}",
    "grid": "give true or false",
}


def _request_error(error: ValidationError) -> RequestError:
    """The first thing that pydantic found, in the project's words."""
    first = error.errors(include_url=False, include_context=False)[0]
    error_type, value = first["type"], repr(first["input"])
    # The value comes from the client and may be megabytes long.
    value = value if len(value) <= 80 else f"{value[:77]}..."
    if error_type == "json_invalid":
        return RequestError("the body is not JSON", remedy='send an object, such as {"seeds": [7]}')
    if not first["loc"]:
        return RequestError(f"the body is {value}, not an object", remedy='send one, such as {"seeds": [7]}')
    param = str(first["loc"][0])
    if error_type == "extra_forbidden":
        return RequestError(f"field '{param}' is unknown", remedy=f"the fields are {', '.join(_REMEDIES)}", param=param)
    place = "".join(f"[{part}]" if isinstance(part, int) else str(part) for part in first["loc"])
    return RequestError(f"{place} is {value}", remedy=_REMEDIES[param], param=param)
