"""Pixels to files: encode one image, lay many out in a grid."""

import io

import numpy as np
from PIL import Image

from uni_instruct.errors import RequestError

# Format -> Pillow's name and options, chosen for latency (docs/serving.md).
_ENCODERS: dict[str, tuple[str, dict[str, int | bool]]] = {
    "png": ("PNG", {"compress_level": 1}),
    "jpeg": ("JPEG", {"quality": 92}),
    "webp": ("WEBP", {"lossless": True, "method": 0}),
}
IMAGE_FORMATS = tuple(_ENCODERS)
SHEET_GREY = 72


def encode(image: np.ndarray, format: str = "png") -> bytes:
    """A file of one image, uint8 [H, W, 1 or 3]. Raises RequestError for a format outside IMAGE_FORMATS."""
    if format not in _ENCODERS:
        raise RequestError(
            f"image format '{format}' is unknown",
            remedy=f"choose one of {', '.join(IMAGE_FORMATS)}",
            param="format",
        )
    name, options = _ENCODERS[format]
    buffer = io.BytesIO()
    to_pil(image).save(buffer, name, **options)
    return buffer.getvalue()


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 [H, W, 1 or 3] as a grey or RGB picture."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def grid(images: np.ndarray, columns: int | None = None, padding: int = 0) -> np.ndarray:
    """Images uint8 [N, H, W, C], row by row, as one picture; near square unless columns are given. Empty cells are black."""
    count, height, width, channels = images.shape
    columns = columns or max(1, int(np.ceil(np.sqrt(count))))
    rows = -(-count // columns)
    cell = np.zeros((rows * columns, height + padding, width + padding, channels), dtype=np.uint8)
    cell[:count, :height, :width] = images
    sheet = cell.reshape(rows, columns, *cell.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(sheet.reshape(rows * cell.shape[1], columns * cell.shape[2], channels))


def contact_sheet(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """A grid to look at, uint8 [H', W', 1 or 3]: a grey line round every image, small images enlarged to 32 pixels or so.

    Of latents, which have more channels, the first three.
    """
    images = images[..., :3]
    count, height, width, channels = images.shape
    framed = np.full((count, height + 2, width + 2, channels), SHEET_GREY, dtype=np.uint8)
    framed[:, 1:-1, 1:-1] = images
    return enlarge(grid(framed, columns), factor=max(1, 32 // height))


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Each pixel of [H, W, C] as a square of factor x factor."""
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
