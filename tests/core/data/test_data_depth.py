"""Pictures of 16 bits become 8: the upper byte, whatever file they come in and on either way of reading."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders.data_sets import all_images, png
from uni_instruct.data import check_data, open_dataset
from uni_instruct.errors import FileFormatError

# One of each upper byte, and the ends of the lower: what a cut at 255 or a rounding would change.
LEVELS = np.array([[0, 1, 255, 256], [0x7F00, 0x7FFF, 0x8000, 0x80FF], [0xFE80, 0xFEFF, 0xFF00, 0xFFFF]], np.uint16)


def of_pillow(form: str, dtype: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(LEVELS.astype(dtype)).save(buffer, form)
    return buffer.getvalue()


def pgm() -> bytes:
    return b"P5 4 3 65535\n" + LEVELS.astype(">u2").tobytes()


def png_of_colour() -> bytes:
    """A PNG of 16-bit colour, by hand: Pillow writes none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in LEVELS)
    header = struct.pack(">IIBBBBB", 4, 3, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


FILES = {
    "a.png": of_pillow("PNG", "<u2"),
    "little.tif": of_pillow("TIFF", "<u2"),
    "big.tif": of_pillow("TIFF", ">u2"),
    "a.pgm": pgm(),
    "colour.png": png_of_colour(),
}


@pytest.mark.parametrize("name", FILES)
def test_the_upper_byte_is_kept(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    dataset = open_dataset(tmp_path)
    channels = 3 if name.startswith("colour") else 1
    assert dataset.image_shape == (channels, 3, 4)
    assert np.array_equal(all_images(dataset)[0], (LEVELS >> 8)[:, :, None].repeat(channels, axis=2))
    assert check_data(str(tmp_path)).wrong == ()


def test_deep_grey_stands_among_others_and_is_resized(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(FILES["a.png"])
    (tmp_path / "2.png").write_bytes(png((LEVELS >> 8).astype(np.uint8)))
    (tmp_path / "3.png").write_bytes(png(np.zeros((3, 4, 3), np.uint8)))
    images = all_images(open_dataset(tmp_path))
    assert images.shape == (3, 3, 4, 3)
    assert np.array_equal(images[0], images[1])
    small = all_images(open_dataset(tmp_path, resolution=2))
    assert np.array_equal(small[0], small[1])
    assert small[0].max() > 200


def test_a_cut_picture_of_16_bits_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(FILES["a.png"][:-30])
    with pytest.raises(FileFormatError, match=r"a\.png in .* cannot be read"):
        all_images(open_dataset(tmp_path))


@pytest.mark.parametrize("name", ["a.heic", "a.jpg"])
def test_photos_of_phones_are_read_once_they_are_saved_as_the_line_says(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / name).write_bytes(b"\0\0\0\x18ftypheic" + os.urandom(64))
    with pytest.raises(FileFormatError, match="save HEIC as JPEG or PNG") as refused:
        open_dataset(folder)
    assert (refused.value.exit_code, "\n" in str(refused.value)) == (2, False)
    (folder / name).unlink()
    Image.fromarray(np.full((4, 4, 3), 90, np.uint8)).save(folder / "a.jpg")
    assert all_images(open_dataset(folder)).shape == (1, 4, 4, 3)
