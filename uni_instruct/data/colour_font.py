"""ColourFont: a font whose characters are small colour pictures, such as Noto Color Emoji. Needs fontTools."""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from uni_instruct.data.storage import UNREADABLE, reason_of
from uni_instruct.errors import FileFormatError, MissingExtraError, RequestError

REMEDY = "apt install fonts-noto-color-emoji, or give a colour font's file as emoji:FILE"
MAX_SIDE = 255  # pixels: a strike stores its metrics as bytes
MAX_NAME_BYTES = 1 << 20  # of the name table; its offsets have 16 bits, and fontTools takes hours to read a longer one
_VARIATION = 0xFE0F  # variation selector for the colour form; fonts list sequences with it or without it
_LIGATURES = 4
_NAME, _VERSION, _LICENCE = 4, 5, 13
_TABLES = ("CBDT", "CBLC", "cmap", "name")


class ColourFont:
    """The pictures in a font's tables CBDT and CBLC, found by its cmap and, for sequences, by the ligatures of GSUB.

    The pictures are read without a text engine, so a font gives the same pictures on every machine: FreeType cannot join
    sequences, and HarfBuzz, which can, is missing in some builds of Pillow.
    Raises RequestError if there is no such file, FileFormatError if it is not a font or has no colour pictures.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise RequestError(f"there is no font {path}", remedy=REMEDY, param="source")
        self.path = path
        unreadable = _unreadable()
        try:
            with _quiet():
                self._read()
        except unreadable as error:
            problem = f"{path} is not a whole font: {reason_of(error)}"
            raise FileFormatError(problem, remedy=REMEDY, param="source") from error

    def picture(self, sequence: Sequence[int]) -> Image.Image | None:
        """The RGBA picture of a sequence of code points. None if the font has none, or only several pictures side by side.

        Raises FileFormatError if the picture is damaged.
        """
        # Fonts list some sequences with the variation selector and some without.
        plain = [point for point in sequence if point != _VARIATION]
        for points in (sequence, plain):
            glyph = self._glyph(points)
            if glyph in self._strike:
                return self._decoded(glyph)
        return None

    def _read(self) -> None:
        from fontTools.ttLib import TTFont

        with TTFont(self.path, fontNumber=0, lazy=True) as font:
            missing = [table for table in _TABLES if table not in font]
            if missing:
                problem = f"{self.path} has no colour pictures (no table {missing[0]})"
                raise FileFormatError(problem, remedy=REMEDY, param="source")
            if (length := font.reader.tables["name"].length) > MAX_NAME_BYTES:
                raise ValueError(f"table name has {length} bytes")
            self.name, self.version, self.licence = (_named(font, number) for number in (_NAME, _VERSION, _LICENCE))
            self._characters: dict[int, str] = font.getBestCmap() or {}
            self._ligatures = _ligatures(font)
            sizes = [strike.bitmapSizeTable.ppemY for strike in font["CBLC"].strikes]
            # A strike holds all pictures at one size. The largest loses least when it is scaled down.
            strike = font["CBDT"].strikeData[sizes.index(max(sizes))]
            self._strike = {name: glyph.imageData for name, glyph in strike.items() if hasattr(glyph, "imageData")}

    def _glyph(self, points: Sequence[int]) -> str:
        names = tuple(self._characters.get(point, "") for point in points)
        return names[0] if len(names) == 1 else self._ligatures.get(names, "")

    def _decoded(self, glyph: str) -> Image.Image:
        try:
            with Image.open(io.BytesIO(self._strike[glyph]), formats=["PNG"]) as image:
                if max(image.size) > MAX_SIDE:
                    raise ValueError(f"it is {image.width}x{image.height}")
                return image.convert("RGBA")
        except UNREADABLE as error:
            problem = f"glyph {glyph} in {self.path} cannot be read: {reason_of(error)}"
            raise FileFormatError(problem, remedy="install the font again", param="source") from error


def _named(font: Any, number: int) -> str:
    return " ".join((font["name"].getDebugName(number) or "unknown").split())


def _ligatures(font: Any) -> dict[tuple[str, ...], str]:
    """Map each sequence of glyph names to the name of the glyph that replaces it."""
    found: dict[tuple[str, ...], str] = {}
    lookups = font["GSUB"].table.LookupList.Lookup if "GSUB" in font else []
    for table in (getattr(sub, "ExtSubTable", sub) for lookup in lookups for sub in lookup.SubTable):
        if table.LookupType == _LIGATURES:
            for first, rows in table.ligatures.items():
                for row in rows:
                    found.setdefault((first, *row.Component), row.LigGlyph)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence fontTools within the block. It warns about every oddity of a font, which may be thousands of lines."""
    logger = logging.getLogger("fontTools")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _unreadable() -> tuple[type[BaseException], ...]:
    try:
        from fontTools.misc.sstruct import Error
        from fontTools.ttLib import TTLibError
    except ModuleNotFoundError as error:
        raise MissingExtraError("fonttools", extra="train") from error
    # AssertionError: fontTools asserts what it expects of a table. ImportError: woff2 needs another package.
    return (*UNREADABLE, TTLibError, Error, AssertionError, ImportError)
