"""POST /v1/walk: images along a path through noise from seed to seed, at single positions or as an animation.

The path has one stop for each seed; noise is interpolated between stops. If two stops have different classes, the classes'
embeddings are interpolated too, provided that the engine can do so.
"""

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from uni_instruct.class_mixture import ClassIds, ClassMixture
from uni_instruct.errors import RequestError
from uni_instruct.generate import resolve_class_ids
from uni_instruct.images import encode, grid, to_pil
from uni_instruct.noise import Between, NoisePoint, walk_points
from uni_instruct.serve.models.served_model import ServedModel
from uni_instruct.serve.routes.responses import generate_encoded, timing_headers
from uni_instruct.serve.routes.schema import Seed, ShortErrors, field_remedies, parse_model
from uni_instruct.spec import ModelSpec

MAX_STOPS = 64
# The longest side of an animation, in pixels: browsers and image viewers open this without problems.
MAX_ANIMATED_SIDE = 1024
# Pixels of all frames together: 256 frames of 512x512, which take seconds to encode. Four times as many took 48 s and 1 GB.
MAX_ANIMATED_PIXELS = 256 * 512 * 512
_MAX_HEADER_LENGTH = 2048


class WalkRequest(BaseModel):
    """The body of POST /v1/walk."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = Field(
        None,
        description="Name of the generator, as GET /v1/models lists it. By default the first.",
        examples=["a model of GET /v1/models"],
    )
    seeds: ShortErrors[Seed] = Field(
        description="The seeds to walk through (stops), at most 64, as integers or strings of digits. Noise is interpolated "
        "spherically between two of them.",
        examples=["two or more seeds, such as [7, 8]"],
    )
    positions: ShortErrors[float] | None = Field(
        None,
        description="Positions on the walk: 0 is the first seed, 1.5 is half-way from the second to the third. By default [0].",
        examples=["a list of numbers, such as [0.5]"],
    )
    frames: int | None = Field(
        None,
        description="Instead of positions: the number of evenly spaced positions from the first seed to the last.",
        examples=["an integer, such as 48"],
    )
    count: int = Field(
        1,
        description="Number of walks side by side. Walk i goes through the seeds + i.",
        examples=["an integer, such as 16"],
    )
    class_ids: ShortErrors[int] | None = Field(
        None,
        description="Class ids: one for all stops, or one for each (see morph). By default each seed draws its own.",
        examples=["a list of integers, such as [3]"],
    )
    classes: ShortErrors[str] | None = Field(
        None, description="Class names, instead of class_ids.", examples=['a list of names, such as ["3"]']
    )
    morph: bool = Field(
        True,
        description="Whether to interpolate the class between two stops. If false, or if the engine cannot mix classes "
        "(mixes_classes in GET /v1/spec), images get the class of the nearer stop.",
        examples=["true or false"],
    )
    format: Literal["png", "jpeg", "webp", "zip"] = Field(
        "png", description="One sheet with all images, or a zip with a PNG of each.", examples=["png, jpeg, webp or zip"]
    )
    animated: bool = Field(
        False, description="Return an animated WebP with one frame for each position.", examples=["true or false"]
    )
    fps: float = Field(
        20.0, ge=1, le=60, description="Frames per second of an animation.", examples=["a number from 1 to 60, such as 20"]
    )
    scale: int = Field(
        1,
        ge=1,
        le=64,
        description="Whole factor by which an animation is enlarged.",
        examples=["an integer from 1 to 64, such as 8"],
    )


@dataclass(frozen=True)
class WalkJob:
    """A checked walk. points, class_ids: what the engine gets, ordered by position, and by path within a position."""

    wanted: WalkRequest
    points: list[NoisePoint]
    class_ids: ClassIds | None

    @property
    def frames(self) -> int:
        """The number of positions. Each has `count` points."""
        return len(self.points) // self.wanted.count


def parse_walk(body: bytes) -> WalkRequest:
    """Parse a JSON body. Raises RequestError."""
    return parse_model(WalkRequest, body, field_remedies(WalkRequest), example='{"seeds": [7, 8]}')


async def walk_response(served: ServedModel, job: WalkJob) -> Response:
    """Return the images of a job, with the headers of /v1/generate except X-Seeds. Not to be cached."""
    wanted = job.wanted
    encoded = await generate_encoded(
        served, job.points, job.class_ids, lambda images: [encode_walk(job, images)], job.wanted.format
    )
    headers = {**timing_headers(served, encoded.stage_ms), "Cache-Control": "no-store"}
    if job.class_ids is not None and len(ids := ",".join(_class_names(job.class_ids))) <= _MAX_HEADER_LENGTH:
        headers["X-Class-Ids"] = ids
    media_type = "application/zip" if wanted.format == "zip" else f"image/{wanted.format}"
    return Response(encoded.files[0], headers=headers, media_type=media_type)


def resolve_walk(wanted: WalkRequest, spec: ModelSpec, limit: int, mixes_classes: bool) -> WalkJob:
    """Check a walk of at most `limit` images and resolve its points and classes.

    mixes_classes: whether the engine can mix classes. Raises RequestError.
    """
    _check_numbers(wanted, spec, limit)
    positions = _positions(wanted)
    ways = [[int(seed) + way for seed in wanted.seeds] for way in range(wanted.count)]
    points_of_ways = [walk_points(way, positions) for way in ways]
    points = [way[index] for index in range(len(positions)) for way in points_of_ways]
    return WalkJob(wanted, points, _class_ids(wanted, spec, ways, positions, mixes_classes))


def encode_walk(job: WalkJob, images: np.ndarray) -> bytes:
    """Encode the images of a job, uint8 [N, H, W, C] in the order of its points, as the file that it asks for."""
    if job.wanted.format == "zip":
        return _zip(job.points, images)
    if not job.wanted.animated:
        return encode(grid(images), job.wanted.format)
    scale = job.wanted.scale
    sheets = [grid(frame) for frame in np.split(images, job.frames)]
    # Pixels are repeated a whole number of times, which keeps them square and sharp. Lossy compression would blur their edges.
    pictures = [to_pil(sheet.repeat(scale, axis=0).repeat(scale, axis=1)) for sheet in sheets]
    buffer = io.BytesIO()
    options = {"duration": round(1000 / job.wanted.fps), "loop": 0, "lossless": True, "quality": 30, "method": 0}
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], **options)
    return buffer.getvalue()


def _zip(points: Sequence[NoisePoint], images: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for index, (point, image) in enumerate(zip(points, images, strict=True)):
            archive.writestr(f"{index:05d}-{_name(point)}.png", encode(image))
    return buffer.getvalue()


def _name(point: NoisePoint) -> str:
    return f"seed{point.start}-to-{point.end}-at-{point.position:.3f}" if isinstance(point, Between) else f"seed{point}"


def _positions(wanted: WalkRequest) -> list[float]:
    if wanted.frames is None:
        return [0.0] if wanted.positions is None else wanted.positions
    last = len(wanted.seeds) - 1
    steps = max(1, wanted.frames - 1)  # a single frame is at the first stop
    return [last * index / steps for index in range(wanted.frames)]


def _class_ids(
    wanted: WalkRequest, spec: ModelSpec, ways: list[list[int]], positions: list[float], mixes_classes: bool
) -> ClassIds | None:
    """Return the classes of all images, [positions x paths] in one dimension; None for an unconditional generator.

    With `morph` and an engine that mixes classes, a mixture of the classes of the two stops around the position; otherwise the
    class of the nearer stop.
    """
    labels: Sequence[int | str] | None = wanted.class_ids if wanted.class_ids is not None else wanted.classes
    if labels is not None and not labels:
        raise RequestError("the list of classes is empty", remedy="name one, or leave it out", param="classes")
    of_ways = [ids for way in ways if (ids := resolve_class_ids(spec, way, labels)) is not None]
    if not of_ways:
        return None
    ids, places = np.stack(of_ways, axis=1), np.asarray(positions, dtype=np.float64)  # [stops, ways], [positions]
    if not (wanted.morph and mixes_classes):
        return ids[np.floor(places + 0.5).astype(np.int64)].ravel()
    before = np.floor(places).astype(np.int64)
    first, second = ids[before], ids[np.minimum(before + 1, len(ids) - 1)]
    # A class mixed with itself could differ from the plain class in the last bit, so equal classes get share 0.
    share = np.where(first == second, 0.0, (places - before)[:, None]).astype(np.float32)
    return ClassMixture(first.ravel(), second.ravel(), share.ravel()).simplified()


def _class_names(class_ids: ClassIds) -> list[str]:
    """Return each image's class for X-Class-Ids: '3', or '3-to-5-at-0.750' for three quarters of the way from 3 to 5."""
    if not isinstance(class_ids, ClassMixture):
        return list(map(str, class_ids))
    rows = zip(class_ids.class_ids, class_ids.other_ids, class_ids.share, strict=True)
    return [f"{first}-to-{second}-at-{share:.3f}" if share else str(first) for first, second, share in rows]


def _check_numbers(wanted: WalkRequest, spec: ModelSpec, limit: int) -> None:
    """Raise RequestError for fields that exclude each other, numbers out of range, or more than `limit` images."""
    if not 1 <= len(wanted.seeds) <= MAX_STOPS:
        raise RequestError(f"the walk has {len(wanted.seeds)} stops", remedy=f"give 1 to {MAX_STOPS} seeds", param="seeds")
    for first, second in (("positions", "frames"), ("class_ids", "classes")):
        if getattr(wanted, first) is not None and getattr(wanted, second) is not None:
            raise RequestError(f"both {first} and {second} are given", remedy="give one of them", param=second)
    if wanted.count < 1:
        raise RequestError(f"count is {wanted.count}", remedy="ask for at least 1", param="count")
    param = "positions" if wanted.frames is None else "frames"
    frames = (1 if wanted.positions is None else len(wanted.positions)) if wanted.frames is None else wanted.frames
    if not 1 <= frames * wanted.count <= limit:
        raise RequestError(
            f"{frames} {param} of {wanted.count} images were asked for",
            remedy=f"ask for 1 to {limit} images in one request",
            param=param,
        )
    if wanted.animated:
        _check_animation(wanted, spec, frames)


def _check_animation(wanted: WalkRequest, spec: ModelSpec, frames: int) -> None:
    if wanted.format != "webp":
        raise RequestError(f"{wanted.format} cannot be animated", remedy='give "format": "webp"', param="animated")
    _, height, width = spec.image_shape
    columns = math.ceil(math.sqrt(wanted.count))  # of one frame, as `grid` arranges its images
    side = columns * wanted.scale * max(height, width)
    if side > MAX_ANIMATED_SIDE:
        remedy = f"choose a scale of at most {max(1, MAX_ANIMATED_SIDE * wanted.scale // side)}, or a smaller count"
        raise RequestError(f"the animation would be {side} pixels wide", remedy=remedy, param="scale")
    frame = columns**2 * height * width
    largest = math.isqrt(MAX_ANIMATED_PIXELS // (frames * frame))
    if wanted.scale > largest:
        smaller = f"choose a scale of at most {largest}, or fewer frames"
        raise RequestError(
            f"{frames} frames of {side} pixels a side are too many",
            remedy=smaller if largest else f"choose at most {MAX_ANIMATED_PIXELS // frame} frames and a scale of 1",
            param="scale",
        )
