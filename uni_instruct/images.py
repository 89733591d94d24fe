"""Encode one image as a file; arrange many images in a grid."""

import io
import struct
import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from uni_instruct.errors import RequestError

# Format -> Pillow's name and options, chosen for latency (docs/serving.md).
_ENCODERS: dict[str, tuple[str, dict[str, int | bool]]] = {
    "png": ("PNG", {"compress_level": 1}),
    "jpeg": ("JPEG", {"quality": 92}),
    "webp": ("WEBP", {"lossless": True, "method": 0}),
}
IMAGE_FORMATS = tuple(_ENCODERS)
# PNGs of at most this many bytes of pixels are written here: Pillow takes four times as long, most of it before the first
# pixel. Larger ones are left to Pillow, which chooses a filter for each line: its files are a tenth smaller.
_SMALL = 64 * 64 * 3
# At most this many bytes are stored without compression.
_TINY = 256
# Contact sheets: the grey level and width of the lines, and the height in pixels that small images are enlarged to.
SHEET_GREY, SHEET_LINE, SHEET_PIXELS = 72, 2, 64


def checked_images(images: ArrayLike) -> np.ndarray:
    """The images as uint8 [N, H, W, C]. Raises RequestError for anything else: casting floats would make wrong pixels."""
    array = np.asarray(images)
    if array.dtype == np.uint8 and array.ndim == 4:
        return array
    found = f"images are {array.dtype} {list(array.shape)}"
    if array.ndim == 4 and array.size and array.dtype.kind == "f":
        found += f" from {array.min():.3g} to {array.max():.3g}"
        remedy = "convert floats in [-1, 1] with (images * 127.5 + 128).clip(0, 255).astype('uint8')"
    else:
        remedy = "give what generate_images, read_samples or an engine returns"
    raise RequestError(f"{found}, not uint8 [N, H, W, C]", remedy=remedy, param="images")


def encode(image: np.ndarray, format: str = "png", quality: int | None = None) -> bytes:
    """The bytes of an image file. image: uint8 [H, W, 1 or 3].

    format: one of IMAGE_FORMATS. quality: 0 to 100, for jpeg and webp; a webp with a quality is lossy, without one lossless.

    Raises RequestError for floats, or a format outside IMAGE_FORMATS.
    """
    checked_images(image[None])
    if format not in _ENCODERS:
        raise RequestError(
            f"image format '{format}' is unknown",
            remedy=f"choose one of {', '.join(IMAGE_FORMATS)}",
            param="format",
        )
    name, options = _ENCODERS[format]
    if quality is not None and format != "png":
        options = {"quality": max(1, quality), "method": 0}  # for JPEG, Pillow reads quality 0 as its default
    if format == "png" and 0 < image.size <= _SMALL and image.shape[2] in _PNG_COLOURS:
        return _small_png(image)
    buffer = io.BytesIO()
    to_pil(image).save(buffer, name, **options)
    return buffer.getvalue()


def _small_png(image: np.ndarray) -> bytes:
    """A PNG file of one image uint8 [H, W, 1 or 3]: 8 bits a channel, lines without a filter (PNG specification, 3rd ed.)."""
    height, width, channels = image.shape
    lines = np.zeros((height, 1 + width * channels), dtype=np.uint8)  # each line begins with its filter type: 0, none
    lines[:, 1:] = image.reshape(height, width * channels)
    return b"".join((_png_head(width, height, channels), _png_chunk(b"IDAT", _deflated(lines.tobytes())), _PNG_END))


def _deflated(data: bytes) -> bytes:
    """A zlib stream of the data (RFC 1950)."""
    if len(data) > _TINY:
        # Run-length matching compresses such small pictures better than zlib's string matching, and is faster.
        packer = zlib.compressobj(1, strategy=zlib.Z_RLE)
        return packer.compress(data) + packer.flush()
    # One stored block (RFC 1951, 3.2.4): starting a compressor takes ten times as long, and saves 8 of 150 bytes.
    return b"\x78\x01\x01" + struct.pack("<HH", len(data), len(data) ^ 0xFFFF) + data + struct.pack(">I", zlib.adler32(data))


@lru_cache(maxsize=64)
def _png_head(width: int, height: int, channels: int) -> bytes:
    return _PNG + _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, _PNG_COLOURS[channels], 0, 0, 0))


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


_PNG_COLOURS = {1: 0, 3: 2}  # channels -> grey or RGB
_PNG, _PNG_END = b"\x89PNG\r\n\x1a\n", _png_chunk(b"IEND", b"")


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 [H, W, 1 or 3] as a grey or RGB image of Pillow."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def grid(images: np.ndarray, columns: int | None = None, padding: int = 0) -> np.ndarray:
    """Arrange images uint8 [N, H, W, C] row by row in one picture uint8 [H', W', C]. Empty cells are black.

    columns: by default chosen so that the grid is nearly square. padding: black pixels right of and below each image.

    Raises RequestError for floats.
    """
    images = checked_images(images)
    count, height, width, channels = images.shape
    columns = columns or max(1, int(np.ceil(np.sqrt(count))))
    rows = -(-count // columns)
    cell = np.zeros((rows * columns, height + padding, width + padding, channels), dtype=np.uint8)
    cell[:count, :height, :width] = images
    sheet = cell.reshape(rows, columns, *cell.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(sheet.reshape(rows * cell.shape[1], columns * cell.shape[2], channels))


def contact_sheet(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """A grid for viewing, uint8 [H', W', 1 or 3], with a grey line around each image.

    Images smaller than SHEET_PIXELS are enlarged by the largest whole factor that keeps their height within it.

    Raises RequestError for floats.
    """
    images = checked_images(images)
    factor, line = max(1, SHEET_PIXELS // images.shape[1]), SHEET_LINE
    count, height, width, channels = images.shape
    framed = np.full((count, factor * height + 2 * line, factor * width + 2 * line, channels), SHEET_GREY, dtype=np.uint8)
    framed[:, line:-line, line:-line] = images.repeat(factor, axis=1).repeat(factor, axis=2)
    return grid(framed, columns)


def latent_preview(latents: np.ndarray) -> np.ndarray:
    """A rough preview of a VAE's latents float32 [N, C, H, W], to watch a training run: uint8 [N, H, W, 1 or 3].

    The first channels are shown as colours. Black and white are at -2 and +2 standard deviations (`vae_latents.FINAL_STD`).
    These are not decoded pictures.
    """
    shown = latents[:, : 3 if latents.shape[1] >= 3 else 1]
    return (np.nan_to_num(shown) * 127.5 + 128).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
