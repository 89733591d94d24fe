"""Answers with images: one picture, a grid, or a container of several (JSON, npz, zip), with their headers."""

import asyncio
import base64
import io
import json
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from starlette.responses import Response

from uni_instruct.class_mixture import ClassIds
from uni_instruct.images import encode, grid
from uni_instruct.noise import NoisePoint
from uni_instruct.serve.batching.batcher import Generated
from uni_instruct.serve.errors import TimedOutError
from uni_instruct.serve.models.served_model import ServedModel
from uni_instruct.serve.routes.schema import Job, shown_seed
from uni_instruct.spec import ModelSpec

# The longest header value that is sent, in characters: proxies commonly refuse more than 8 kB of headers.
_MAX_HEADER_LENGTH = 2048
# Limits for encoding on the event loop, in a fraction of a millisecond: formats, images, bytes of pixels (64x64 in colour).
_QUICK = ("png", "jpeg", "json", "npz")
_QUICK_IMAGES, _QUICK_BYTES = 8, 64 * 64 * 3


@dataclass(frozen=True)
class EncodedImages:
    """The encoded files of a request, and its milliseconds by stage: queue, model and encode."""

    files: list[bytes]
    stage_ms: dict[str, float]


async def image_response(served: ServedModel, job: Job) -> Response:
    """Return the images of a job, with headers for seeds, classes, model, engine and the milliseconds by stage."""
    spec = served.spec
    encoded = await generate_encoded(
        served, job.seeds, job.class_ids, lambda images: [encode_job(job, images, spec)], job.format
    )
    headers = {**job_headers(job), **timing_headers(served, encoded.stage_ms)}
    return Response(encoded.files[0], headers=headers, media_type=media_type(job))


def timing_headers(served: ServedModel, stage_ms: dict[str, float]) -> dict[str, str]:
    """Return the headers that say what made the images, and Server-Timing with the milliseconds by stage."""
    timing = ", ".join(f"{stage};dur={milliseconds:.2f}" for stage, milliseconds in stage_ms.items())
    return {**served.engine_headers, "Server-Timing": timing}


async def generate_images(served: ServedModel, seeds: Sequence[NoisePoint], class_ids: ClassIds | None) -> Generated:
    """Make images without encoding them. Raises NotReadyError, and what Batcher.submit raises."""
    generated = await served.batcher.submit(seeds, class_ids, served.settings.timeout_s)
    served.metrics.record_stages({"queue": generated.queue_ms, "model": generated.model_ms})
    return generated


async def generate_encoded(
    served: ServedModel,
    seeds: Sequence[NoisePoint],
    class_ids: ClassIds | None,
    encoder: Callable[[np.ndarray], list[bytes]],
    format: str,
    factor: int = 1,
) -> EncodedImages:
    """Make the images of the seeds and encode them with `encoder`, which takes uint8 [N, H, W, C] and returns files.

    class_ids: int64 [N] or mixtures, None for an unconditional generator. format, factor: what the encoder writes and by how
    much it enlarges the images; they decide whether it runs on the event loop or in a thread.
    Raises NotReadyError, TimedOutError, and what Batcher.submit raises.
    """
    ends = asyncio.get_running_loop().time() + served.settings.timeout_s
    generated = await served.batcher.submit(seeds, class_ids, served.settings.timeout_s)
    start = time.perf_counter()
    images = generated.images
    if format in _QUICK and len(images) <= _QUICK_IMAGES and images.nbytes * factor**2 <= _QUICK_BYTES:
        # On the event loop: passing a small picture to a thread takes longer than encoding it.
        files = encoder(images)
    else:
        # In a thread: compressing a grid takes milliseconds, during which the event loop could not serve other requests.
        files = await _encoded_in_thread(served, encoder, images, ends)
    encode_ms = 1e3 * (time.perf_counter() - start)
    stage_ms = {"queue": generated.queue_ms, "model": generated.model_ms, "encode": encode_ms}
    served.metrics.record_stages(stage_ms)
    return EncodedImages(files, stage_ms)


async def _encoded_in_thread(
    served: ServedModel, encoder: Callable[[np.ndarray], list[bytes]], images: np.ndarray, ends: float
) -> list[bytes]:
    """Encode in a thread. Raises TimedOutError if this is not done at time `ends` of the event loop: others may be in line."""
    try:
        async with asyncio.timeout_at(ends):
            return await asyncio.get_running_loop().run_in_executor(served.encoders, encoder, images)
    except TimeoutError:
        served.metrics.dropped["timeout"].inc(len(images))
        problem = f"{len(images)} images were made, but not encoded in {served.settings.timeout_s:g} s"
        raise TimedOutError(problem, remedy="ask for fewer, for smaller ones, or try later") from None


def media_type(job: Job) -> str:
    """Return the media type of the file that `encode_job` makes."""
    return _CONTAINERS[job.format][0] if job.format in _CONTAINERS else f"image/{job.format}"


def encode_job(job: Job, images: np.ndarray, spec: ModelSpec) -> bytes:
    """Encode the images of a job, uint8 [N, H, W, C], as the file that it asks for."""
    if job.format in _CONTAINERS:
        _, pack = _CONTAINERS[job.format]
        return pack(job, images, spec)
    return encode(grid(images) if job.grid else images[0], job.format)


def job_headers(job: Job) -> dict[str, str]:
    """Return the headers that identify the images: X-Seeds in the notation of --seeds, and X-Class-Ids.

    A list that is too long for a header is left out. The client still knows the seeds: those that the server draws are one
    short range, and others are in its request.
    """
    headers = {"X-Seeds": seed_ranges(job.seeds)}
    if job.class_ids is not None:
        headers["X-Class-Ids"] = ",".join(map(str, job.class_ids.tolist()))
    if job.format in ("npz", "zip"):
        headers["Content-Disposition"] = f'attachment; filename="images.{job.format}"'
    return {name: value for name, value in headers.items() if len(value) <= _MAX_HEADER_LENGTH}


def seed_ranges(seeds: list[int]) -> str:
    """Return seeds as '0-63,70', which `parse_seeds` reads back in the same order."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)


def _json(job: Job, images: np.ndarray, spec: ModelSpec) -> bytes:
    """Encode as {"images": [{seed, class_id, class_name, b64_png}]}. The class is null for an unconditional generator."""
    entries = []
    for index, (seed, image) in enumerate(zip(job.seeds, images, strict=True)):
        class_id = None if job.class_ids is None else int(job.class_ids[index])
        entries.append(
            {
                "seed": shown_seed(seed, job.seed_format),
                "class_id": class_id,
                "class_name": None if class_id is None else spec.class_name(class_id),
                "b64_png": base64.b64encode(encode(image)).decode(),
            }
        )
    return json.dumps({"images": entries}).encode()


def _npz(job: Job, images: np.ndarray, spec: ModelSpec) -> bytes:
    """Encode as npz: arr_0 (uint8 [N, H, W, C]), seeds, and class_ids if the generator has classes."""
    arrays = {"arr_0": images, "seeds": np.array(job.seeds, dtype=np.int64)}
    if job.class_ids is not None:
        arrays["class_ids"] = job.class_ids
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _zip(job: Job, images: np.ndarray, spec: ModelSpec) -> bytes:
    """Encode as zip: PNGs named by index and seed, and EDM's dataset.json with the classes."""
    # The index comes first in the names, because a seed may occur twice, and sorted names then keep the request's order.
    names = [f"{index:05d}-seed{seed}.png" for index, seed in enumerate(job.seeds)]
    labels = None if job.class_ids is None else [[n, int(c)] for n, c in zip(names, job.class_ids, strict=True)]
    buffer = io.BytesIO()
    # Not compressed, because PNGs do not become smaller. EDM's tools expect it, too.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, encode(image))
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return buffer.getvalue()


_Pack = Callable[[Job, np.ndarray, ModelSpec], bytes]

# Format for several images -> its media type and the function that encodes it.
_CONTAINERS: dict[str, tuple[str, _Pack]] = {
    "json": ("application/json", _json),
    "npz": ("application/octet-stream", _npz),
    "zip": ("application/zip", _zip),
}
