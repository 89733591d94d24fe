"""What goes back to the client: the images of a job as one picture, a grid or a container of several; or an error."""

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

# Proxies commonly refuse more than 8 kB of headers.
_MAX_HEADER_LENGTH = 2048
# What is encoded in a fraction of a millisecond: formats, images, and bytes of pixels (one picture of 64x64 in colour).
_QUICK = ("png", "jpeg", "json", "npz")
_QUICK_IMAGES, _QUICK_BYTES = 8, 64 * 64 * 3


@dataclass(frozen=True)
class EncodedImages:
    """The files that were made of a request's images, and the milliseconds in queue, model and encoding."""

    files: list[bytes]
    stage_ms: dict[str, float]


async def image_response(served: ServedModel, job: Job) -> Response:
    """The images of a job, with headers that name seeds, classes, model, engine and milliseconds by stage."""
    spec = served.spec
    encoded = await generate_encoded(
        served, job.seeds, job.class_ids, lambda images: [encode_job(job, images, spec)], job.format
    )
    headers = {**job_headers(job), **timing_headers(served, encoded.stage_ms)}
    return Response(encoded.files[0], headers=headers, media_type=media_type(job))


def timing_headers(served: ServedModel, stage_ms: dict[str, float]) -> dict[str, str]:
    """What made the images, and the milliseconds by stage."""
    timing = ", ".join(f"{stage};dur={milliseconds:.2f}" for stage, milliseconds in stage_ms.items())
    return {**served.made_by, "Server-Timing": timing}


async def generate_images(served: ServedModel, seeds: Sequence[NoisePoint], class_ids: ClassIds | None) -> Generated:
    """The images themselves. Raises NotReadyError, and what Batcher.submit raises."""
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
    """The files that `encoder` makes of the seeds' images uint8 [N, H, W, C], enlarged by a factor, in that format.

    class_ids: int64 [N] or mixtures, None for an unconditional generator. Raises NotReadyError, and what Batcher.submit raises.
    """
    ends = asyncio.get_running_loop().time() + served.settings.timeout_s
    generated = await served.batcher.submit(seeds, class_ids, served.settings.timeout_s)
    start = time.perf_counter()
    images = generated.images
    if format in _QUICK and len(images) <= _QUICK_IMAGES and images.nbytes * factor**2 <= _QUICK_BYTES:
        # Here: to hand a small picture to a thread takes longer than to encode it.
        files = encoder(images)
    else:
        # In a thread: compressing a grid takes milliseconds, in which the event loop would answer nobody.
        files = await _encoded_in_thread(served, encoder, images, ends)
    encode_ms = 1e3 * (time.perf_counter() - start)
    stage_ms = {"queue": generated.queue_ms, "model": generated.model_ms, "encode": encode_ms}
    served.metrics.record_stages(stage_ms)
    return EncodedImages(files, stage_ms)


async def _encoded_in_thread(
    served: ServedModel, encoder: Callable[[np.ndarray], list[bytes]], images: np.ndarray, ends: float
) -> list[bytes]:
    """Raises TimedOutError where it is not done by then, in the event loop's time: others may be before it."""
    try:
        async with asyncio.timeout_at(ends):
            return await asyncio.get_running_loop().run_in_executor(served.encoders, encoder, images)
    except TimeoutError:
        served.metrics.dropped["timeout"].inc(len(images))
        problem = f"{len(images)} images were made, but not encoded in {served.settings.timeout_s:g} s"
        raise TimedOutError(problem, remedy="ask for fewer, for smaller ones, or try later") from None


def media_type(job: Job) -> str:
    """The media type of the file that `encode_job` makes."""
    return _CONTAINERS[job.format][0] if job.format in _CONTAINERS else f"image/{job.format}"


def encode_job(job: Job, images: np.ndarray, spec: ModelSpec) -> bytes:
    """The file that the job asks for. images: uint8 [N, H, W, C]."""
    if job.format in _CONTAINERS:
        _, pack = _CONTAINERS[job.format]
        return pack(job, images, spec)
    return encode(grid(images) if job.grid else images[0], job.format)


def job_headers(job: Job) -> dict[str, str]:
    """Which images these are: X-Seeds in the notation of --seeds, and X-Class-Ids.

    A list too long for a header is left out: drawn seeds are one short range, and others the client sent itself.
    """
    headers = {"X-Seeds": seed_ranges(job.seeds)}
    if job.class_ids is not None:
        headers["X-Class-Ids"] = ",".join(map(str, job.class_ids.tolist()))
    if job.format in ("npz", "zip"):
        headers["Content-Disposition"] = f'attachment; filename="images.{job.format}"'
    return {name: value for name, value in headers.items() if len(value) <= _MAX_HEADER_LENGTH}


def seed_ranges(seeds: list[int]) -> str:
    """Seeds as '0-63,70', which parse_seeds reads back in the same order."""
    parts: list[list[int]] = []
    for seed in seeds:
        if parts and seed == parts[-1][1] + 1:
            parts[-1][1] = seed
        else:
            parts.append([seed, seed])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in parts)


def _json(job: Job, images: np.ndarray, spec: ModelSpec) -> bytes:
    """{"images": [{seed, class_id, class_name, b64_png}]}; the class is null where there is none."""
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
    """arr_0 (uint8 [N, H, W, C]), seeds, and class_ids where there are classes."""
    arrays = {"arr_0": images, "seeds": np.array(job.seeds, dtype=np.int64)}
    if job.class_ids is not None:
        arrays["class_ids"] = job.class_ids
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _zip(job: Job, images: np.ndarray, spec: ModelSpec) -> bytes:
    """PNGs in the order of the request, named by place and seed, and EDM's dataset.json with the classes."""
    # The place comes first: a seed may occur twice, and names in order keep the order of the request.
    names = [f"{index:05d}-seed{seed}.png" for index, seed in enumerate(job.seeds)]
    labels = None if job.class_ids is None else [[n, int(c)] for n, c in zip(names, job.class_ids, strict=True)]
    buffer = io.BytesIO()
    # Stored, as PNGs do not become smaller; it is also what EDM's tools expect.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, encode(image))
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return buffer.getvalue()


_Pack = Callable[[Job, np.ndarray, ModelSpec], bytes]

# Formats that hold several images -> their media type, and what makes the file.
_CONTAINERS: dict[str, tuple[str, _Pack]] = {
    "json": ("application/json", _json),
    "npz": ("application/octet-stream", _npz),
    "zip": ("application/zip", _zip),
}
