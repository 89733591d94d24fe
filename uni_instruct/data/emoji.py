"""Emoji: one 32x32 colour picture of each Unicode emoji, from a colour font, on white; classes are Unicode's groups."""

import math
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from uni_instruct.data.colour_font import REMEDY, ColourFont
from uni_instruct.data.dataset import ArrayReader, Dataset
from uni_instruct.errors import FileFormatError

NAME = "emoji"
SIDE = 32
DEBIAN_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

_TABLE = "emoji_sequences.txt"
_CANVAS = 17 / 16  # times the largest picture's side, which leaves it a margin of almost a pixel
_WHITE = (255, 255, 255)
_LINEAR_MAX = 65535

CodePoints = tuple[int, ...]


def open_emoji(font: Path | None = None) -> Dataset:
    """Every emoji of the table for which the font has one picture, in the table's order. Of equal pictures the first is kept.

    font: by default the one of Debian's package.
    Raises RequestError if there is no such font; FileFormatError if it is damaged, has no colour pictures, or lacks most emoji.
    """
    path = font or DEBIAN_FONT
    return _rendered(path, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=1)
def _rendered(path: Path, _changed_ns: int) -> Dataset:
    """The data set of a font file, cached: one command may open its data several times, and rendering takes seconds."""
    opened = ColourFont(path)
    groups = emoji_groups()
    found = [(picture, label) for label, rows in enumerate(groups.values()) for row in rows if (picture := opened.picture(row))]
    total = sum(map(len, groups.values()))
    if len(found) < total / 2 or len({label for _, label in found}) < len(groups):
        problem = f"{path} has {len(found)} of {total} emoji, too few or none of a group"
        raise FileFormatError(problem, remedy=REMEDY, param="source")
    images = downscaled([picture for picture, _ in found])
    kept = _first_of_equals(images)
    return Dataset(
        name=NAME,
        image_shape=(3, SIDE, SIDE),
        labels=np.array([label for _, label in found], dtype=np.int64)[kept],
        num_classes=len(groups),
        class_names=tuple(groups),
        licence="OFL-1.1" if "Open Font License" in opened.licence else opened.licence,
        source=f"{opened.name}, {opened.version}",
        reader=ArrayReader(images[kept]),
        note=_note(total - len(found), len(found) - len(kept)),
    )


def emoji_groups() -> dict[str, list[CodePoints]]:
    """Unicode's groups, each with the code points of its fully-qualified emoji without skin tones."""
    groups: dict[str, list[CodePoints]] = {}
    for line in files("uni_instruct.data").joinpath(_TABLE).read_text("utf-8").splitlines():
        if line.startswith("group: "):
            rows = groups.setdefault(line.removeprefix("group: "), [])
        elif not line.startswith("#"):
            rows.append(tuple(int(point, 16) for point in line.split()))
    return groups


def downscaled(pictures: Sequence[Image.Image]) -> np.ndarray:
    """RGBA pictures on white, each centred by its visible part, all at one scale: uint8 [N, SIDE, SIDE, 3].

    A pixel is the mean of the light of the area that it covers. All sums are of integers below 2^53, so every machine computes
    the same pixels.
    """
    # One scale for all pictures, set by the largest. With one scale each, a heart would be as large as a house.
    cut = [picture.crop(picture.getchannel("A").getbbox()) for picture in pictures]
    side = math.ceil(max(max(picture.size) for picture in cut) * _CANVAS)
    weights = _area_weights(side)
    light = _linear_light()
    # The borders between the 256 levels, as sums over side * side pixels.
    borders = (light[1:] + light[:-1]) / 2 * side**2
    out = np.empty((len(cut), SIDE, SIDE, 3), dtype=np.uint8)
    for row, picture in zip(out, cut, strict=True):
        canvas = Image.new("RGB", (side, side), _WHITE)
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2), picture)
        # Averaged in linear light: the mean of sRGB levels would make thin lines too dark.
        lines = weights @ light[np.asarray(canvas)].reshape(side, -1)
        sums = weights @ lines.reshape(SIDE, side, 3).swapaxes(0, 1).reshape(side, -1)
        row[...] = np.searchsorted(borders, sums).reshape(SIDE, SIDE, 3).swapaxes(0, 1)
    return out


def _area_weights(side: int) -> np.ndarray:
    """float64 [SIDE, side]: how much of each of `side` pixels is in each of SIDE, as integers; each row sums to side."""
    fine, coarse = np.arange(side) * SIDE, np.arange(SIDE)[:, None] * side
    return np.maximum(np.minimum(fine + SIDE, coarse + side) - np.maximum(fine, coarse), 0).astype(np.float64)


def _linear_light() -> np.ndarray:
    """float64 [256]: the light of each sRGB level (IEC 61966-2-1), as integers in 0..65535."""
    level = np.arange(256) / 255
    return np.rint(np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4) * _LINEAR_MAX)


def _first_of_equals(images: np.ndarray) -> list[int]:
    first: dict[bytes, int] = {}
    for index, image in enumerate(images):
        first.setdefault(image.tobytes(), index)
    return list(first.values())


def _note(missing: int, equal: int) -> str:
    parts = [f"{missing} emoji are not in the font"] * bool(missing) + [f"{equal} duplicates are left out"] * bool(equal)
    return ", ".join(parts)
