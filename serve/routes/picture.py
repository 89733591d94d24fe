"""One image as a file of a given size and format. OpenAI's route and the image route share this."""

import re
from dataclasses import dataclass

import numpy as np

from uni_instruct.errors import RequestError
from uni_instruct.images import encode
from uni_instruct.spec import ModelSpec

# A format as written in a path or request -> the encoder's name for it.
PICTURE_FORMATS = {"png": "png", "jpeg": "jpeg", "jpg": "jpeg", "webp": "webp"}
# The longest side of an enlarged image, in pixels: more than the sizes that OpenAI's clients request.
MAX_PICTURE_SIDE = 2048
_SIZE = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class Picture:
    """How to write an image to a file: format, whole factor to enlarge it by, quality 0..100 of lossy formats (or None)."""

    format: str = "png"
    factor: int = 1
    quality: int | None = None

    def encode(self, image: np.ndarray) -> bytes:
        """Encode one image uint8 [H, W, C]. To enlarge it, pixels are repeated, not interpolated, so no new values appear."""
        if self.factor > 1:
            image = image.repeat(self.factor, axis=0).repeat(self.factor, axis=1)
        return encode(image, self.format, self.quality)


def size_factor(size: str | None, spec: ModelSpec) -> int:
    """Return the whole factor that enlarges an image to 'WxH'; 1 for None or 'auto'. Raises RequestError if there is none."""
    if size is None or size == "auto":
        return 1
    _, height, width = spec.image_shape
    match = _SIZE.fullmatch(size)
    wide, high = (int(match[1]), int(match[2])) if match else (0, 0)
    factor = wide // width
    if not match or (factor * width, factor * height) != (wide, high) or not factor or max(wide, high) > MAX_PICTURE_SIDE:
        raise RequestError(
            f"size {size[:40]!r} is not available",
            remedy=f"leave it out, or give {width}x{height} or a whole multiple of it, up to {MAX_PICTURE_SIDE} pixels a side",
            param="size",
        )
    return factor


def size_text(spec: ModelSpec, factor: int) -> str:
    """Return width and height of an image enlarged by that factor, as '64x64'."""
    _, height, width = spec.image_shape
    return f"{factor * width}x{factor * height}"


def quality_of(compression: int | None, format: str) -> int | None:
    """Return the encoder's quality for output_compression. Raises RequestError if png is given one, or outside 0..100."""
    if compression is None:
        return None
    if not 0 <= compression <= 100:
        raise RequestError(
            f"output_compression is {str(compression)[:40]}", remedy="give an integer from 0 to 100", param="output_compression"
        )
    if format == "png":
        if compression == 100:  # OpenAI's default value, which its clients may send explicitly
            return None
        raise RequestError(
            "png is lossless and has no output_compression",
            remedy="leave it out, or choose the output_format jpeg or webp",
            param="output_compression",
        )
    return compression
