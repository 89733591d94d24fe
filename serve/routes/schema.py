"""The body of POST /v1/generate as a pydantic model, its checks, and its conversion to seeds and class ids."""

import reprlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import from_json

from uni_instruct.errors import RequestError
from uni_instruct.generate import resolve_class_ids
from uni_instruct.images import IMAGE_FORMATS
from uni_instruct.spec import ModelSpec

# JavaScript's numbers are exact only up to 2**53, so its clients send and receive larger seeds as strings of digits.
Seed = int | Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,18})$")]
SeedFormat = Literal["integer", "string"]
ResponseFormat = Literal["png", "jpeg", "webp", "npz", "zip", "json"]

# Seeds that the server draws stay below 2**53, so that JavaScript's numbers hold them exactly.
_DRAWN_SEED_LIMIT = 2**53
# The most characters of a client's value that an error message repeats.
_MAX_VALUE_LENGTH = 80


_Item = TypeVar("_Item")
# A list whose check stops at the first bad item. Describing all bad items of a long list takes longer than a whole request.
ShortErrors = Annotated[list[_Item], Field(fail_fast=True)]


class GenerateRequest(BaseModel):
    """The body of POST /v1/generate. All fields are optional: an empty object makes one image."""

    # Strict: a misspelled field or a seed of 7.0 is an error. Ignoring it would return images that were not asked for.
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(None, description="Name of the generator, as GET /v1/models lists it. By default the first.")
    seeds: ShortErrors[Seed] | None = Field(
        None, description="One image for each; integers in [0, 2**63), or the same as strings of digits.", examples=[[7, 8]]
    )
    num_images: int | None = Field(None, description="Instead of seeds: the number of images. The server draws their seeds.")
    class_ids: ShortErrors[int] | None = Field(
        None, description="Class ids: one for all images, or one for each. By default each seed draws its own."
    )
    classes: ShortErrors[str] | None = Field(None, description="Class names, instead of class_ids.")
    format: ResponseFormat | None = Field(None, description="By default png for one image or a grid, json for several images.")
    grid: bool = Field(False, description="All images in one picture.")
    seed_format: SeedFormat | None = Field(
        None, description="How seeds are written in a JSON answer. By default as they were given."
    )


@dataclass(frozen=True)
class Job:
    """A checked request that can be run. class_ids: int64 [N], None for an unconditional generator."""

    seeds: list[int]
    class_ids: np.ndarray | None
    format: str
    grid: bool
    seed_format: SeedFormat = "integer"


def parse_request(body: bytes) -> GenerateRequest:
    """Parse a JSON body; an empty body is the default request. Raises RequestError for a body that does not fit."""
    return parse_model(GenerateRequest, body, REMEDIES, example='{"seeds": [7]}')


_Model = TypeVar("_Model", bound=BaseModel)


def parse_model(model: type[_Model], body: bytes, remedies: Mapping[str, str], example: str) -> _Model:
    """Parse a JSON body into a pydantic model; an empty body counts as an empty object.

    remedies: field -> remedy of the error for a bad value; example: a body, for errors. Raises RequestError.
    """
    try:
        fields = from_json(body or b"{}")
    except ValueError:
        raise RequestError("the body is not JSON", remedy=f"send an object, such as {example}") from None
    if not isinstance(fields, dict):
        raise RequestError(f"the body is {_short(fields)}, not an object", remedy=f"send one, such as {example}")
    # Checked before pydantic, which would describe every unknown field, even a hundred thousand of them.
    unknown = next((name for name in fields if name not in model.model_fields), None)
    if unknown is not None:  # not `if unknown`: a field's name may be empty
        name = unknown[:_MAX_VALUE_LENGTH]
        raise RequestError(f"field '{name}' is unknown", remedy=f"the fields are {', '.join(remedies)}", param=name)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _request_error(error, remedies) from None


def field_remedies(model: type[BaseModel]) -> dict[str, str]:
    """Return a remedy for each field of a model, made from the field's first example."""
    return {name: f"give {(field.examples or ['another value'])[0]}" for name, field in model.model_fields.items()}


def resolve(request: GenerateRequest, spec: ModelSpec, limit: int) -> Job:
    """Check a request of at most `limit` images and resolve its seeds, class ids and format. Raises RequestError."""
    seeds = _seeds(request, limit)
    if request.class_ids is not None and request.classes is not None:
        raise RequestError("both class_ids and classes are given", remedy="give one of them", param="classes")
    labels: Sequence[int | str] | None = request.class_ids if request.class_ids is not None else request.classes
    if labels is not None and not labels:
        raise RequestError("the list of classes is empty", remedy="name one, or leave it out", param="classes")
    class_ids = resolve_class_ids(spec, seeds, labels)
    shown_as = seed_format_of(request.seed_format, request.seeds or ())
    return Job(seeds, class_ids, _format(request, len(seeds)), request.grid, shown_as)


def seed_format_of(wanted: SeedFormat | None, given: Iterable[Seed | None]) -> SeedFormat:
    """Return how to write seeds in the answer: as wanted, otherwise as strings if one of the given seeds is a string."""
    return wanted or ("string" if any(isinstance(seed, str) for seed in given) else "integer")


def shown_seed(seed: int, seed_format: SeedFormat) -> int | str:
    """Return the seed as it is written in a JSON answer."""
    return str(seed) if seed_format == "string" else seed


def draw_seeds(count: int) -> list[int]:
    """Draw a random first seed and return `count` consecutive ones, so that X-Seeds can name them as one short range."""
    first = secrets.randbelow(_DRAWN_SEED_LIMIT - count)
    return list(range(first, first + count))


def _seeds(request: GenerateRequest, limit: int) -> list[int]:
    if request.seeds is not None and request.num_images is not None:
        raise RequestError("both seeds and num_images are given", remedy="give one of them", param="num_images")
    # Errors name the field that the client used.
    param = "num_images" if request.seeds is None else "seeds"
    count = len(request.seeds) if request.seeds is not None else request.num_images
    count = 1 if count is None else count
    if not 1 <= count <= limit:
        raise RequestError(f"{count} images were asked for", remedy=f"ask for 1 to {limit} in one request", param=param)
    return draw_seeds(count) if request.seeds is None else [int(seed) for seed in request.seeds]


def _format(request: GenerateRequest, count: int) -> str:
    several = count > 1 and not request.grid
    chosen = request.format or ("json" if several else "png")
    if several and chosen in IMAGE_FORMATS:
        raise RequestError(
            f"{count} images do not fit into one {chosen} file",
            remedy='set "grid": true, or choose the format zip, npz or json',
            param="format",
        )
    if request.grid and chosen not in IMAGE_FORMATS:
        raise RequestError(
            f"a grid is a picture, and {chosen} is not a picture format",
            remedy=f"choose the format {', '.join(IMAGE_FORMATS)}, or leave grid out",
            param="grid",
        )
    return chosen


# Field -> the remedy of an error for a bad value of it.
REMEDIES = {
    "model": "give the name of a model, as GET /v1/models lists them",
    "seeds": "give a list of integers in [0, 2**63), such as [7, 8]",
    "num_images": "give an integer, such as 4",
    "class_ids": "give a list of integers, such as [3]",
    "classes": 'give a list of names, such as ["3"]',
    "format": f"choose one of {', '.join(get_args(ResponseFormat))}",
    "grid": "give true or false",
    "seed_format": "give integer or string",
}


def _request_error(error: ValidationError, remedies: Mapping[str, str]) -> RequestError:
    """Turn the first error that pydantic found into a RequestError with the field's remedy."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = str(first["loc"][0])
    # Keep only list indices: the strings in `loc` after the field are pydantic's names for the types that it tried.
    place = param + "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
    value = "missing" if first["type"] == "missing" else _short(first["input"])
    return RequestError(f"{place} is {value}", remedy=remedies[param], param=param)


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = _MAX_VALUE_LENGTH


def _short(value: object) -> str:
    """Return a client's value as one short line. The value may be megabytes long, so only its ends are formatted."""
    text = _brief.repr(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[: _MAX_VALUE_LENGTH - 3]}..."
