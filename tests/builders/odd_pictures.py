"""One picture in every form that people have, and files that only look like pictures; all made from a level from 0 to 255."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

Size = tuple[int, int]  # width, height
ROTATED = 6  # EXIF's orientation of a picture that lies on its side


class Form(NamedTuple):
    """A file's suffix, the channels that it is read with, and what makes its bytes of a level and a size."""

    suffix: str
    channels: int
    encode: Callable[[int, Size], bytes]


def grey(level: int, size: Size) -> Image.Image:
    return Image.new("L", size, level)


def colour(level: int, size: Size) -> Image.Image:
    """A colour whose red is the level, so that it is told from others, and which is no grey."""
    return Image.new("RGB", size, (level, 255 - level, 100))


def file(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def level_of(picture: np.ndarray) -> int:
    """The level that a picture [H, W, C] was made from; lossy forms change it by less than 3."""
    return round(float(picture[:, :, 0].mean()))


def _deep(level: int, size: Size) -> Image.Image:
    """Grey of 16 bits: the level is the upper byte."""
    return Image.fromarray(np.full((size[1], size[0]), level * 256 + 77, np.uint16))


def _with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.new("L", image.size, 90))
    return image


def _on_its_side(level: int, size: Size) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    return file(colour(level, (size[1], size[0])), "JPEG", quality=98, exif=exif)


def _film(level: int, size: Size, form: str) -> bytes:
    """Moving pictures, of which the first counts."""
    return file(colour(level, size), form, save_all=True, append_images=[colour(255 - level, size)], lossless=True)


FORMS = {
    "grey PNG": Form(".png", 1, lambda level, size: file(grey(level, size), "PNG")),
    "grey PNG with alpha": Form(".PNG", 1, lambda level, size: file(_with_alpha(grey(level, size)), "PNG")),
    "16-bit PNG": Form(".png", 1, lambda level, size: file(_deep(level, size), "PNG")),
    "PNG": Form(".png", 3, lambda level, size: file(colour(level, size), "PNG")),
    "PNG with alpha": Form(".png", 3, lambda level, size: file(_with_alpha(colour(level, size)), "PNG")),
    "PNG with a palette": Form(".png", 3, lambda level, size: file(colour(level, size).quantize(4), "PNG")),
    "transparent palette": Form(".png", 3, lambda level, size: file(colour(level, size).quantize(4), "PNG", transparency=0)),
    "moving PNG": Form(".apng", 3, lambda level, size: _film(level, size, "PNG")),
    "JPEG": Form(".JPG", 3, lambda level, size: file(colour(level, size), "JPEG", quality=98)),
    "grey JPEG": Form(".jpeg", 1, lambda level, size: file(grey(level, size), "JPEG", quality=98)),
    "progressive JPEG": Form(".jfif", 3, lambda level, size: file(colour(level, size), "JPEG", quality=98, progressive=True)),
    "CMYK JPEG": Form(".jpg", 3, lambda level, size: file(colour(level, size).convert("CMYK"), "JPEG", quality=98)),
    "JPEG on its side": Form(".jpg", 3, _on_its_side),
    "TIFF": Form(".tif", 3, lambda level, size: file(colour(level, size), "TIFF", compression="tiff_lzw")),
    "CMYK TIFF": Form(".tiff", 3, lambda level, size: file(colour(level, size).convert("CMYK"), "TIFF")),
    "16-bit TIFF": Form(".tiff", 1, lambda level, size: file(_deep(level, size), "TIFF")),
    "GIF": Form(".gif", 3, lambda level, size: file(colour(level, size).quantize(4), "GIF")),
    "moving GIF": Form(".gif", 3, lambda level, size: _film(level, size, "GIF")),
    "WebP": Form(".webp", 3, lambda level, size: file(colour(level, size), "WEBP", lossless=True)),
    "BMP": Form(".bmp", 3, lambda level, size: file(colour(level, size), "BMP")),
    "16-bit PGM": Form(".pgm", 1, lambda level, size: file(_deep(level, size), "PPM")),
    "PPM": Form(".ppm", 3, lambda level, size: file(colour(level, size), "PPM")),
    "TGA": Form(".tga", 3, lambda level, size: file(colour(level, size), "TGA")),
    # Names that say nothing: the file is known by what it holds.
    "no suffix": Form("", 3, lambda level, size: file(colour(level, size), "JPEG", quality=98)),
    "a suffix of no kind": Form(".jpg_large", 1, lambda level, size: file(grey(level, size), "PNG")),
}


def _spoilt(content: bytes) -> bytes:
    """With one byte changed in the middle of the pixels."""
    at = content.index(b"IDAT") + 6
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


# What is called a picture and is none that can be read: each is named and refused.
BROKEN: dict[str, tuple[str, Callable[[Size], bytes]]] = {
    "empty file": (".png", lambda _: b""),
    "cut PNG": (".png", lambda size: file(grey(9, size), "PNG")[:50]),
    "cut JPEG": (".jpg", lambda size: file(colour(9, size), "JPEG")[:-40]),
    "spoilt PNG": (".png", lambda size: _spoilt(file(grey(9, size), "PNG"))),
    "text called PNG": (".png", lambda _: b"this is no picture\n"),
    "page called JPEG": (".jpg", lambda _: b"<!DOCTYPE html><title>404 Not Found</title>"),
    "HEIC called JPEG": (".jpg", lambda _: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(80)),
    "floats": (".tif", lambda size: file(Image.new("F", size, 0.5), "TIFF")),
    "integers of 32 bits": (".tif", lambda size: file(Image.new("I", size, 70000), "TIFF")),
    "cut BMP": (".bmp", lambda size: file(colour(9, size), "BMP")[:-30]),
    "zeros": (".webp", lambda _: bytes(200)),
}
