"""POST /v1/images/generations in OpenAI's shape, for its clients. The prompt is a class: this is no text-to-image model."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response, StreamingResponse

from uni_instruct.errors import RequestError
from uni_instruct.generate import resolve_class_ids
from uni_instruct.noise import SEED_LIMIT
from uni_instruct.serve.models.served_model import ServedModel
from uni_instruct.serve.routes.picture import Picture, quality_of, size_factor, size_text
from uni_instruct.serve.routes.responses import generate_encoded, generate_images, timing_headers
from uni_instruct.serve.routes.schema import Seed, SeedFormat, draw_seeds, parse_model, seed_format_of, shown_seed
from uni_instruct.spec import ModelSpec

# The most enlarged pixels of one request: 16 images of 1024 x 1024. More would keep the encoders busy for seconds.
MAX_OPENAI_PIXELS = 16 * 1024 * 1024
_NAMED_CLASSES = 12  # the most class names that an error message lists


class ImagesRequest(BaseModel):
    """The body of POST /v1/images/generations: OpenAI's fields, and two of our own, seed and seed_format.

    quality, style, moderation, partial_images and user are accepted, because OpenAI's clients send them, but have no effect: a
    one-step generator has no intermediate images and no quality setting.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(
        "", description="A class by name or id. If empty, each seed draws its own. This is not a text-to-image model."
    )
    model: str | None = Field(None, description="Name of the generator, as GET /v1/models lists it. By default the first.")
    n: int | None = Field(None, description="Number of images, by default 1.")
    size: str | None = Field(
        None, description="'auto' (the model's own size), or a whole multiple of that size, such as '1024x1024'."
    )
    seed: Seed | None = Field(None, description="Seed of the first image. The others get the seeds after it.")
    seed_format: SeedFormat | None = Field(
        None, description="How seeds are written in the answer. By default as they were given."
    )
    response_format: Literal["b64_json", "url"] | None = Field(None, description="By default b64_json.")
    output_format: Literal["png", "jpeg", "webp"] | None = Field(None, description="By default png.")
    output_compression: int | None = Field(None, description="Quality of jpeg and webp, 0 to 100.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are opaque.")
    stream: bool | None = Field(None, description="Server-sent events: one image_generation.completed for each image.")
    partial_images: int | None = Field(
        None, description="Accepted, but without effect: a one-step generator has no partial images."
    )
    quality: str | None = Field(None, description="Accepted, but without effect.")
    style: str | None = Field(None, description="Accepted, but without effect.")
    moderation: str | None = Field(None, description="Accepted, but without effect.")
    user: str | None = Field(None, description="Accepted, but without effect.")


@dataclass(frozen=True)
class ImagesJob:
    """A checked request. class_ids: int64 [N], None for an unconditional generator. class_given: if the prompt names one."""

    seeds: list[int]
    class_ids: np.ndarray | None
    class_given: bool
    picture: Picture
    size: str
    seed_format: SeedFormat
    as_url: bool
    stream: bool


def parse_images_request(body: bytes) -> ImagesRequest:
    """Parse a JSON body. Raises RequestError."""
    return parse_model(ImagesRequest, body, _REMEDIES, example='{"prompt": ""}')


def resolve_images(request: ImagesRequest, spec: ModelSpec, limit: int) -> ImagesJob:
    """Check a request of at most `limit` images and resolve its seeds, class, size and format. Raises RequestError."""
    seeds = _seeds(request, limit)
    class_id = class_of_prompt(request.prompt, spec)
    class_ids = resolve_class_ids(spec, seeds, class_id)
    format = request.output_format or "png"
    quality = quality_of(request.output_compression, format)
    picture = Picture(format, size_factor(request.size, spec), quality)
    _check_pixels(len(seeds), picture, spec)
    as_url, stream = request.response_format == "url", bool(request.stream)
    if as_url and (stream or quality is not None):
        what = "stream" if stream else "output_compression"
        raise RequestError(
            f"{what} cannot be combined with the response_format url",
            remedy='leave it out, or choose the response_format "b64_json"',
            param=what,
        )
    shown_as = seed_format_of(request.seed_format, [request.seed])
    size = size_text(spec, picture.factor)
    return ImagesJob(seeds, class_ids, class_id is not None, picture, size, shown_as, as_url, stream)


def class_of_prompt(prompt: str, spec: ModelSpec) -> int | None:
    """Return the id of the class that a prompt names, by name in any letter case or by id; None for an empty prompt.

    Raises RequestError for another prompt; it lists classes.
    """
    text = prompt.strip()
    if not text:
        return None
    if not spec.num_classes:
        raise RequestError(
            f"{spec.name} has no classes and is not a text-to-image model, so it cannot use the prompt {text[:40]!r}",
            remedy="leave the prompt empty",
            param="prompt",
        )
    same = [n for n, name in enumerate(spec.class_names) if name.casefold() == text.casefold()]
    try:
        return same[0] if len(same) == 1 else spec.class_id(text)
    except RequestError:
        names = ", ".join(spec.class_name(n) for n in range(min(_NAMED_CLASSES, spec.num_classes)))
        more = ", ..., as GET /v1/spec lists them" if spec.num_classes > _NAMED_CLASSES else ""
        raise RequestError(
            f"{spec.name} has no class {text[:40]!r}, and it is not a text-to-image model",
            remedy=f"the prompt is a class, or empty for random ones: {names}{more}",
            param="prompt",
        ) from None


async def images_response(served: ServedModel, job: ImagesJob, base_url: str) -> Response:
    """Return the images as OpenAI's clients expect them: as JSON with base64 or URLs, or as server-sent events.

    base_url: of this server, with a slash at its end; image URLs begin with it.
    """
    if job.as_url:
        urls = [{"url": _url(served.name, job, index, base_url)} for index in range(len(job.seeds))]
        return JSONResponse(_answer(served, job, urls), headers=served.engine_headers)
    if job.stream:
        # Make the images before the answer starts, so that an error can still be answered with its own HTTP status.
        generated = await generate_images(served, job.seeds, job.class_ids)
        events = _events(served, job, generated.images)
        return StreamingResponse(events, headers=served.engine_headers, media_type="text/event-stream")
    encoded = await generate_encoded(
        served,
        job.seeds,
        job.class_ids,
        lambda images: [job.picture.encode(image) for image in images],
        job.picture.format,
        job.picture.factor,
    )
    entries = [{"b64_json": base64.b64encode(file).decode()} for file in encoded.files]
    return JSONResponse(_answer(served, job, entries), headers=timing_headers(served, encoded.stage_ms))


def _answer(served: ServedModel, job: ImagesJob, entries: list[dict[str, str]]) -> dict[str, object]:
    data = [{**entry, **_facts(served.spec, job, index)} for index, entry in enumerate(entries)]
    return {"created": int(time.time()), "model": served.name, "data": data, **_form(job)}


async def _events(served: ServedModel, job: ImagesJob, images: np.ndarray) -> AsyncIterator[str]:
    """Yield a server-sent event for each image as soon as it is encoded."""
    name = "image_generation.completed"
    for index, image in enumerate(images):
        file = await asyncio.get_running_loop().run_in_executor(served.encoders, job.picture.encode, image)
        event = {
            "type": name,
            "b64_json": base64.b64encode(file).decode(),
            "created_at": int(time.time()),
            "model": served.name,
            **_form(job),
            **_facts(served.spec, job, index),
            # OpenAI's clients expect this field. There are no tokens to count here.
            "usage": {
                "input_tokens": 0,
                "output_tokens": 0,
                "total_tokens": 0,
                "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            },
        }
        yield f"event: {name}\ndata: {json.dumps(event)}\n\n"


def _form(job: ImagesJob) -> dict[str, object]:
    return {"background": "opaque", "output_format": job.picture.format, "quality": "auto", "size": job.size}


def _facts(spec: ModelSpec, job: ImagesJob, index: int) -> dict[str, object]:
    """Return what identifies an image. revised_prompt is OpenAI's field; here it has the name of the image's class."""
    class_id = None if job.class_ids is None else int(job.class_ids[index])
    name = None if class_id is None else spec.class_name(class_id)
    seed = shown_seed(job.seeds[index], job.seed_format)
    return {"seed": seed, "class_id": class_id, "class_name": name, "revised_prompt": name}


def _url(model: str, job: ImagesJob, index: int, base_url: str) -> str:
    """Return the URL of the image at GET /v1/images, which makes the same image again from its seed and class."""
    query = []
    if job.class_given and job.class_ids is not None:
        query.append(f"class={int(job.class_ids[index])}")
    if job.picture.factor > 1:
        query.append(f"size={job.size}")
    path = f"v1/images/{quote(model)}/{job.seeds[index]}.{job.picture.format}"
    return f"{base_url}{path}{'?' if query else ''}{'&'.join(query)}"


def _seeds(request: ImagesRequest, limit: int) -> list[int]:
    count = 1 if request.n is None else request.n
    if not 1 <= count <= limit:
        raise RequestError(f"{str(count)[:40]} images were asked for", remedy=f"ask for 1 to {limit} in one request", param="n")
    if request.seed is None:
        return draw_seeds(count)
    first = int(request.seed)
    if not 0 <= first <= SEED_LIMIT - count:
        raise RequestError(
            f"seed {str(first)[:40]} of {count} images is not in [0, 2**63)",
            remedy=f"give an integer from 0 to 2**63 - {count}",
            param="seed",
        )
    return list(range(first, first + count))


def _check_pixels(count: int, picture: Picture, spec: ModelSpec) -> None:
    _, height, width = spec.image_shape
    if picture.factor > 1 and count * height * width * picture.factor**2 > MAX_OPENAI_PIXELS:
        raise RequestError(
            f"{count} images of {size_text(spec, picture.factor)} are too many",
            remedy=f"ask for fewer, or for {size_text(spec, 1)}",
            param="size",
        )


# Field -> the remedy of an error for a bad value of it.
_REMEDIES = {
    "prompt": "give a string: a class, or nothing for random ones",
    "model": "give the name of a model, as GET /v1/models lists them",
    "n": "give an integer, such as 4",
    "size": "give 'auto', or a size such as '64x64'",
    "seed": "give an integer in [0, 2**63), or the same as a string of digits",
    "seed_format": "give integer or string",
    "response_format": "give b64_json or url",
    "output_format": "give png, jpeg or webp",
    "output_compression": "give an integer from 0 to 100",
    "background": "leave it out, or give opaque: images are not transparent",
    "stream": "give true or false",
    "partial_images": "give an integer",
    "quality": "give a string",
    "style": "give a string",
    "moderation": "give a string",
    "user": "give a string",
}
