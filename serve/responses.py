"""Images to an HTTP answer: one picture, a grid, or a container of several."""

import base64
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from uni_instruct.images import encode, grid
from uni_instruct.serve.schema import Job
from uni_instruct.spec import ModelSpec

# Proxies commonly refuse more than 8 kB of headers.
_LONGEST_HEADER = 2048


@dataclass(frozen=True)
class Answer:
    """What goes back to the client."""

    body: bytes
    media_type: str
    headers: dict[str, str]


def encode_job(job: Job, images: np.ndarray, spec: ModelSpec) -> tuple[bytes, str]:
    """The body and its media type. images: uint8 [N, H, W, C]."""
    container = _CONTAINERS.get(job.format)
    if container is not None:
        media_type, pack = container
        return pack(job, images, spec), media_type
    picture = grid(images) if job.grid else images[0]
    return encode(picture, job.format), f"image/{job.format}"


def job_headers(job: Job) -> dict[str, str]:
    """Which images these are: X-Seeds in the notation of --seeds, and X-Class-Ids.

    A list too long for a header is left out: drawn seeds are one short range, and others the client sent itself.
    """
    headers = {"X-Seeds": seed_ranges(job.seeds)}
    if job.class_ids is not None:
        headers["X-Class-Ids"] = ",".join(map(str, job.class_ids))
    if job.format in ("npz", "zip"):
        headers["Content-Disposition"] = f'attachment; filename="images.{job.format}"'
    return {name: value for name, value in headers.items() if len(value) <= _LONGEST_HEADER}


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
                "seed": seed,
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
    names = [f"{index:05d}-seed{seed}.png" for index, seed in enumerate(job.seeds)]
    labels = None if job.class_ids is None else [[n, int(c)] for n, c in zip(names, job.class_ids, strict=True)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, image in zip(names, images, strict=True):
            archive.writestr(name, encode(image))
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return buffer.getvalue()


_Pack = Callable[[Job, np.ndarray, ModelSpec], bytes]

_CONTAINERS: dict[str, tuple[str, _Pack]] = {
    "json": ("application/json", _json),
    "npz": ("application/octet-stream", _npz),
    "zip": ("application/zip", _zip),
}
