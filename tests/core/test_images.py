"""Pixels in files: lossless forms keep every pixel, grids put every image where it belongs."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from uni_instruct.errors import RequestError
from uni_instruct.images import IMAGE_FORMATS, SHEET_GREY, checked_images, contact_sheet, encode, grid, latent_preview

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (7, 12), (32, 32), (70, 70)])
@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_a_file_holds_the_image(format: str, size: tuple[int, int], channels: int) -> None:
    image = RANDOM.integers(0, 256, (*size, channels), np.uint8)
    read = Image.open(io.BytesIO(encode(image, format)))
    assert (read.format, read.size) == (format.upper(), size[::-1])
    if format == "png":
        assert read.mode == {1: "L", 3: "RGB"}[channels]
    pixels = np.asarray(read.convert("L" if channels == 1 else "RGB")).reshape(image.shape)
    if format != "jpeg":
        np.testing.assert_array_equal(pixels, image)


def test_a_jpeg_is_close_to_a_smooth_image() -> None:
    slope = np.linspace(0, 255, 32)
    image = np.stack([np.add.outer(slope, slope) / 2] * 3, axis=2).astype(np.uint8)
    read = np.asarray(Image.open(io.BytesIO(encode(image, "jpeg"))), dtype=int)
    assert np.abs(read - image).mean() < 2


@pytest.mark.parametrize("make", [contact_sheet, grid, lambda images: encode(images[0])])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, bool])
def test_what_is_no_pixel_is_refused(make: Callable[[np.ndarray], object], dtype: type) -> None:
    with pytest.raises(RequestError, match=r"images are .*, not uint8 \[N, H, W, C\]; (give|convert) "):
        make(np.zeros((2, 4, 4, 1), dtype))


def test_floats_are_told_how_they_become_pixels() -> None:
    floats = np.linspace(-1, 1, 256, dtype=np.float32).reshape(1, 16, 16, 1)
    with pytest.raises(RequestError, match=r"from -1 to 1, not uint8") as refused:
        checked_images(floats)
    advice = str(refused.value).partition("in [-1, 1] with ")[2]
    images = eval(advice, {"images": floats})
    assert checked_images(images) is images
    assert (images.min(), images.max()) == (0, 255)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(RequestError, match="image format 'bmp' is unknown; choose one of png, jpeg, webp"):
        encode(np.zeros((1, 1, 1), np.uint8), "bmp")


def test_a_grid_is_read_row_by_row() -> None:
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) + np.zeros((5, 2, 1, 1), np.uint8) + 1
    expected = [[1, 2, 3], [1, 2, 3], [4, 5, 0], [4, 5, 0]]
    assert grid(images)[:, :, 0].tolist() == expected
    assert grid(images, columns=5)[:, :, 0].tolist() == [[1, 2, 3, 4, 5]] * 2
    padded = [[1, 0, 2, 0], [1, 0, 2, 0], [0] * 4, [3, 0, 4, 0], [3, 0, 4, 0], [0] * 4, [5, 0, 0, 0], [5, 0, 0, 0], [0] * 4]
    assert grid(images, columns=2, padding=1)[:, :, 0].tolist() == padded


@pytest.mark.parametrize("count", [1, 2, 9, 10, 64])
def test_a_grid_holds_every_image_unchanged(count: int) -> None:
    images = RANDOM.integers(0, 256, (count, 4, 6, 3), np.uint8)
    sheet = grid(images)
    columns = sheet.shape[1] // 6
    for index, image in enumerate(images):
        top, left = index // columns * 4, index % columns * 6
        np.testing.assert_array_equal(sheet[top : top + 4, left : left + 6], image)


def test_a_preview_of_latents_shows_their_first_channels() -> None:
    latents = np.array([-1.5, -1, 0, 1, 1.5, np.nan], np.float32).reshape(1, 1, 2, 3).repeat(4, axis=1)
    latents[:, 1] *= -1
    shown = latent_preview(latents)
    assert (shown.shape, shown.dtype) == ((1, 2, 3, 3), np.uint8)
    assert shown[0, ..., 0].tolist() == [[0, 0, 128], [255, 255, 128]]
    assert shown[0, ..., 1].tolist() == [[255, 255, 128], [0, 0, 128]]
    assert latent_preview(latents[:, :2]).shape == (1, 2, 3, 1)


@pytest.mark.parametrize(("size", "factor"), [(8, 8), (28, 2), (32, 2), (33, 1), (64, 1), (100, 1)])
def test_a_contact_sheet_frames_every_image_and_makes_squares_of_its_pixels(size: int, factor: int) -> None:
    images = RANDOM.integers(100, 256, (5, size, size, 3), np.uint8)
    sheet = contact_sheet(images, columns=3)
    cell = size * factor + 4
    assert sheet.shape == (2 * cell, 3 * cell, 3)
    for index, image in enumerate(images):
        top, left = index // 3 * cell, index % 3 * cell
        framed = sheet[top : top + cell, left : left + cell]
        np.testing.assert_array_equal(framed[2:-2, 2:-2], np.kron(image, np.ones((factor, factor, 1), np.uint8)))
        assert {*framed[:2].flat, *framed[-2:].flat, *framed[:, :2].flat, *framed[:, -2:].flat} == {SHEET_GREY}
