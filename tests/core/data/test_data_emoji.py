"""Emoji as a data set: pictures of a colour font, their sequences, their sizes and their faults."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from builders.machine import require_debian
from uni_instruct.data import emoji, is_data, open_dataset
from uni_instruct.data.colour_font import ColourFont
from uni_instruct.data.emoji import downscaled, emoji_groups, open_emoji
from uni_instruct.errors import FileFormatError, MissingExtraError, RequestError

Cli = Callable[..., tuple[int, str, str]]
UNICODE = "/usr/share/unicode/emoji/emoji-test.txt"
FAMILY = (0x1F468, 0x200D, 0x1F469, 0x200D, 0x1F467)
RNG = np.random.default_rng(0)


@pytest.fixture
def noto() -> Path:
    return require_debian(str(emoji.DEBIAN_FONT), "fonts-noto-color-emoji")


def opaque(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)]))


def test_every_level_of_a_flat_picture_stays_what_it_is() -> None:
    pictures = [opaque(np.full((60, 60, 3), level, np.uint8)) for level in range(256)]
    inner = downscaled(pictures)[:, 2:-2, 2:-2]
    assert np.array_equal(inner, np.broadcast_to(np.arange(256)[:, None, None, None], inner.shape))


def test_light_is_averaged_and_not_levels() -> None:
    stripes = np.zeros((60, 60, 3), np.uint8)
    stripes[:, ::2] = 255  # on a canvas of 64: one white and one black column in each of 32
    assert np.array_equal(
        np.unique(downscaled([opaque(stripes)])[0, 1:-1, 1:-1]), [188]
    )  # half the light; half the level is 128


def test_pixels_are_means_over_areas_where_sizes_do_not_divide() -> None:
    pixels = RNG.integers(0, 256, (80, 80, 3), dtype=np.uint8)
    canvas = np.full((85, 85, 3), 255, np.uint8)
    canvas[2:82, 2:82] = pixels
    light = np.where(canvas <= 10, canvas / 255 / 12.92, ((canvas / 255 + 0.055) / 1.055) ** 2.4)
    mean = light.repeat(32, 0).repeat(32, 1).reshape(32, 85, 32, 85, 3).mean((1, 3))
    level = 255 * np.where(mean <= 0.0031308, mean * 12.92, 1.055 * mean ** (1 / 2.4) - 0.055)
    # Half a level for rounding, and light is kept in 65,536 steps.
    assert np.abs(downscaled([opaque(pixels)])[0] - level).max() < 0.52


def test_pictures_are_centred_on_white_at_one_scale_with_a_margin() -> None:
    corner = np.zeros((128, 128, 4), np.uint8)
    corner[:40, :20] = (255, 0, 0, 255)
    whole = np.full((128, 128, 4), (0, 0, 0, 255), np.uint8)
    small, large = downscaled([Image.fromarray(corner), Image.fromarray(whole)])
    assert np.array_equal(small, small[::-1, ::-1])
    assert (small[16, 16].tolist(), small[0, 0].tolist()) == ([255, 0, 0], [255, 255, 255])
    assert np.ptp(np.flatnonzero((small != 255).any((1, 2)))) + 1 in (10, 11)  # 40 of 136 pixels
    assert (large[0] > 240).all()
    assert not large[2:-2, 2:-2].any()


def test_transparency_is_white() -> None:
    half = np.full((60, 60, 4), (0, 0, 0, 128), np.uint8)
    assert np.unique(downscaled([Image.fromarray(half)])[0, 2:-2, 2:-2]).tolist() == [127]


@pytest.mark.debian
def test_the_table_is_unicode_s() -> None:
    expected: dict[str, list[tuple[int, ...]]] = {}
    for line in require_debian(UNICODE, "unicode-data").read_text("utf-8").splitlines():
        if line.startswith("# group: ") and line != "# group: Component":
            expected[line.removeprefix("# group: ")] = []
        # Later versions of Unicode add emoji, which the table does not have.
        entry = re.match(r"([0-9A-F ]+); fully-qualified +# \S+ E(\d+\.\d+) ", line)
        if entry and float(entry[2]) <= 15 and not re.search("1F3F[B-F]", entry[1]):
            expected[list(expected)[-1]].append(tuple(int(point, 16) for point in entry[1].split()))
    assert {name: set(rows) for name, rows in expected.items()} == {name: set(rows) for name, rows in emoji_groups().items()}


def test_the_table_has_no_emoji_twice() -> None:
    rows = [row for rows in emoji_groups().values() for row in rows]
    assert len(rows) == len(set(rows)) == 1870


@pytest.mark.debian
def test_one_picture_an_emoji(noto: Path) -> None:
    font = ColourFont(noto)
    family = font.picture(FAMILY)
    assert family is not None
    assert family.size == (136, 128)
    assert font.picture((0x2764,)) == font.picture((0x2764, 0xFE0F)) != family
    assert font.picture((0x1F600, 0x1F600)) is None  # two side by side
    assert font.picture((ord("q"),)) is None


@pytest.mark.debian
def test_pictures_are_those_that_freetype_draws(noto: Path) -> None:
    font, freetype = ColourFont(noto), ImageFont.truetype(str(noto), 109, layout_engine=ImageFont.Layout.BASIC)
    alone = [row for rows in emoji_groups().values() for row in rows if len(row) == 1]
    for (point,) in alone[::40]:
        ours, theirs = Image.new("RGB", (136, 128), "white"), Image.new("RGB", (136, 128), "white")
        picture = font.picture((point,))
        ours.paste(picture, (0, 0), picture)
        ImageDraw.Draw(theirs).text((0, 0), chr(point), font=freetype, embedded_color=True)
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 2, hex(point)


@pytest.mark.debian
def test_emoji_of_debian(noto: Path, cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("data", "prepare", "emoji", "--out", tmp_path / "emoji.zip", "--json")
    facts = json.loads(out)
    assert (code, facts["image_shape"], facts["num_classes"], facts["licence"]) == (0, [3, 32, 32], 9, "OFL-1.1")
    assert facts["class_names"] == list(emoji_groups())
    assert facts["source"].startswith("Noto Color Emoji, Version 2.")
    prepared, direct = open_dataset(tmp_path / "emoji.zip"), open_dataset(f"emoji:{noto}")
    assert prepared.fingerprint() == direct.fingerprint()
    assert len(np.unique(direct.images(range(len(direct))), axis=0)) == len(direct)
    if "Version 2.042;" not in direct.source:
        pytest.skip("the numbers below are those of Noto Color Emoji 2.042")
    assert direct.fingerprint() == "2a70e00831d5c33b3f35cad7335e3fd81c2efa63711c47b6284931e0e6e2cbca"
    assert np.bincount(prepared.labels).tolist() == [166, 362, 152, 133, 218, 85, 261, 223, 261]
    assert direct.note == "9 duplicates are left out"


@pytest.mark.debian
def test_emoji_stand_wherever_a_data_set_is_named(noto: Path, cli: Cli) -> None:
    assert is_data("emoji")
    assert is_data(f"emoji:{noto}")
    code, out, _ = cli("data", "check", f"emoji:{noto}")
    assert (code, out.startswith("nothing is wrong: emoji, ")) == (0, True)
    code, out, _ = cli("inspect", f"emoji:{noto}", "--json")
    assert (code, json.loads(out)["images"]) == (0, len(open_dataset("emoji")))
    assert open_dataset(f"emoji:{noto}", resolution=8).image_shape == (3, 8, 8)


def edited(noto: Path, path: Path, change: Callable[[Any], None]) -> Path:
    with TTFont(noto, lazy=True) as font:
        change(font)
        font.save(path)
    return path


def keep_characters(keep: Callable[[int], bool]) -> Callable[[Any], None]:
    def change(font: Any) -> None:
        for table in font["cmap"].tables:
            if table.isUnicode():
                table.cmap = {point: glyph for point, glyph in table.cmap.items() if keep(point)}

    return change


@pytest.mark.debian
def test_what_a_font_lacks_is_left_out_and_counted(noto: Path, tmp_path: Path) -> None:
    without_faces = keep_characters(lambda point: not 0x1F600 <= point < 0x1F610)
    few = open_emoji(edited(noto, tmp_path / "few.ttf", without_faces))
    # 🙈 and others are not among them; 😮‍💨, 😵‍💫 and 😶‍🌫️ begin with later ones.
    assert few.note.startswith("16 emoji are not in the font, ")
    assert len(few) == len(open_emoji(noto)) - 16
    assert few.labels[0] == 0


@pytest.mark.debian
@pytest.mark.parametrize("lacking", [["Food & Drink"], [name for name in emoji_groups() if name != "People & Body"]])
def test_a_font_that_lacks_a_group_or_most_emoji(noto: Path, tmp_path: Path, lacking: list[str]) -> None:
    points = {row[0] for name in lacking for row in emoji_groups()[name]}

    def keep(point: int) -> bool:
        return point not in points

    path = edited(noto, tmp_path / "lacks.ttf", keep_characters(keep))
    with pytest.raises(FileFormatError, match=r"lacks.ttf has \d+ of 1870 emoji, too few or none of a group; apt install"):
        open_emoji(path)


@pytest.mark.debian
def test_damaged_fonts_are_told_in_one_line(noto: Path, cli: Cli, tmp_path: Path) -> None:
    content = noto.read_bytes()
    with TTFont(noto, lazy=True) as font:
        face = font["CBDT"].strikeData[0][font.getBestCmap()[0x1F600]].imageData
    faults = {
        "cut": (content[: len(content) // 2], "is not a whole font: "),
        "empty": (b"", "is not a whole font: Not a TrueType or OpenType font"),
        "text": (b"no font" * 100, "is not a whole font: Not a TrueType or OpenType font"),
        "names": (content.replace(b"name", b"nama", 1), "has no colour pictures (no table name)"),
        "picture": (content.replace(face, face[:60] + bytes(len(face) - 60)), "cannot be read: "),
    }
    for name, (damaged, message) in faults.items():
        path = tmp_path / f"{name}.ttf"
        path.write_bytes(damaged)
        code, out, err = cli("data", "prepare", f"emoji:{path}", "--out", tmp_path / "x.zip")
        assert (code, out, len(err.splitlines())) == (2, "", 1), err
        assert message in err
    assert not (tmp_path / "x.zip").exists()


def test_a_font_without_colour(cli: Cli, tmp_path: Path) -> None:
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef"])
    builder.setupCharacterMap({})
    builder.setupNameTable({"fullName": "Plain"})
    builder.save(tmp_path / "plain.ttf")
    with pytest.raises(FileFormatError, match=r"plain.ttf has no colour pictures \(no table CBDT\); apt install fonts-noto"):
        open_dataset(f"emoji:{tmp_path / 'plain.ttf'}")


def test_a_missing_font_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(emoji, "DEBIAN_FONT", tmp_path / "none.ttf")
    for source in ("emoji", f"emoji:{tmp_path / 'none.ttf'}", f"emoji:{tmp_path}/none.ttf"):
        with pytest.raises(RequestError, match=r"there is no font .*none.ttf; apt install fonts-noto-color-emoji, or give"):
            open_dataset(source)


def test_a_missing_fonttools_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "some.ttf").write_bytes(b"")
    for name in [name for name in sys.modules if name.partition(".")[0] == "fontTools"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fontTools", None)
    with pytest.raises(MissingExtraError, match=r"'fonttools' is not installed; pip install 'uni-instruct\[train\]'"):
        open_dataset(f"emoji:{tmp_path / 'some.ttf'}")
