"""Decode image files to pixels, one at a time. None of them stays in memory."""

import io
import threading
import warnings

import numpy as np
from PIL import Image, ImageOps

from uni_instruct.data.storage import UNREADABLE, Store, has_suffix, name_in_store, reason_of
from uni_instruct.errors import FileFormatError
from uni_instruct.images import to_pil
from uni_instruct.system.file_type import HEAD, PULL_LFS, SAVE_HEIC, FileType, begins_as_heic, begins_as_lfs

# Every suffix that Pillow opens as a picture. It is listed here because asking Pillow loads all of its plugins at each start.
_SUFFIXES = (
    ".png .apng .jpg .jpeg .jpe .jfif .mpo .webp .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm .avif .avifs .jp2 .j2k .jpc "
    ".jpf .jpx .j2c .tga .icb .vda .vst .pcx .dcx .dds .ico .icns .cur .psd .qoi .sgi .rgb .rgba .bw .ras .im .msp .xbm .xpm "
    ".pxr .blp .fli .flc .ftc .ftu .gbr .pcd"
)
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
# Those that may hold several pictures. A PNG may too, but few do, and opening each would cost too much.
_MULTI_IMAGE = (".gif", ".tif", ".tiff", ".apng", ".webp", ".avif", ".avifs", ".fli", ".flc", ".dcx")
MULTI_IMAGE_SUFFIXES = (*_MULTI_IMAGE, *map(str.upper, _MULTI_IMAGE))
# Formats that Pillow recognises but cannot decode (scientific data, films), decodes by running another program (EPS), or never
# decodes to 8 bits.
_UNSUPPORTED = ".bufr .grib .h5 .hdf .mpg .mpeg .iim .eps .ps .wmf .emf .fit .fits .pfm"
UNSUPPORTED_SUFFIXES = frozenset(_UNSUPPORTED.split())
_GREY_MODES = frozenset({"1", "L", "LA"})
_COLOUR_MODES = frozenset({"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"})
# 16-bit grey from PNG and TIFF. A PGM of more than 255 levels is opened in mode I, with its levels spread over 16 bits.
_DEEP_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_COLOURS = {1: " grey", 3: " colour"}
# EXIF orientations with a quarter turn, which swaps width and height.
_SIDEWAYS = frozenset({5, 6, 7, 8})
_EXIF_ORIENTATION = 0x0112
_PNG, _PNG_HEADER, _PNG_GREY = b"\x89PNG\r\n\x1a\n", 26, (0, 4)
# Warning filters belong to the whole process. Of two threads that change them at once, one would leave its own in place.
_WARNING_FILTERS = threading.Lock()


class ImageFileReader:
    """Decodes the named files of a store to uint8 [H, W, channels].

    size: the (H, W) that every file must have. With `resize`, each image is centre-cropped and resized to it instead. Grey
    becomes colour if channels is 3; colour becomes grey only with `recolour`.
    """

    def __init__(
        self,
        store: Store,
        names: list[str],
        size: tuple[int, int],
        channels: int,
        resize: bool = False,
        recolour: bool = False,
    ):
        self.store = store
        self.names = names
        self.size = size
        self.channels = channels
        self.resize = resize
        self.recolour = recolour

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """See ImageReader. Raises FileFormatError, which names the file, if one cannot be read or has another size."""
        out = np.empty((len(indices), *self.size, self.channels), dtype=np.uint8)
        for row, index in zip(out, indices, strict=True):
            row[...] = self._picture(self.names[index])
        return out

    def _picture(self, name: str) -> np.ndarray:
        image = decode(self.store, name, self.resize)
        if self.resize:
            image = crop_and_resize(image, self.size[0])
        if (image.shape[2] == 1 and self.channels == 3) or self.recolour:
            image = in_channels(image, self.channels)
        if image.shape != (*self.size, self.channels):
            raise size_mismatch(self.store, name, image.shape, (*self.size, self.channels))
        return image


def decode(store: Store, name: str, any_size: bool = False) -> np.ndarray:
    """A file's pixels, rotated upright by its EXIF orientation: uint8 [H, W, 1 or 3]. Transparency is dropped.

    Of 16 bits the upper 8 are kept, in grey as in colour. any_size: also take images that are so large that they must be
    resized. Raises FileFormatError.
    """
    try:
        with _opened(store, name, any_size) as image:
            mode = "L" if _channels(image) == 1 else "RGB"
            upright = ImageOps.exif_transpose(image)
            # Pillow itself keeps the upper byte of 16-bit colour, but clips 16-bit grey at 255.
            pixels = (np.asarray(upright) >> 8).astype(np.uint8) if _is_deep(image) else np.asarray(upright.convert(mode))
    except UNREADABLE as error:
        raise _unreadable(store, name, error) from error
    return pixels[:, :, None] if mode == "L" else pixels


def image_file_shape(store: Store, name: str, any_size: bool = False) -> tuple[int, int, int]:
    """The upright (H, W, C) of a file, from its header only. Raises FileFormatError."""
    try:
        with _opened(store, name, any_size) as image:
            width, height = image.size
            if image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS:
                width, height = height, width
            return height, width, _channels(image)
    except UNREADABLE as error:
        raise _unreadable(store, name, error) from error


def has_several_images(store: Store, name: str) -> bool:
    """Whether a file holds several pictures, such as an animation or a scan of many pages. False if it cannot be read."""
    try:
        with _opened(store, name, True) as image:
            # Phones store a second, smaller version of a photo in a JPEG (MPO). It is not another picture.
            return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except UNREADABLE:
        return False


def common_shape(store: Store, names: list[str], any_size: bool = False) -> tuple[int, int, int]:
    """The (H, W, C) of all files; C is 3 if any file is in colour. Raises FileFormatError if sizes are mixed.

    any_size: sizes may differ, because the images will be resized; the first file's is returned.
    """
    first = image_file_shape(store, names[0], any_size)
    channels = first[2]
    for name in names[1:]:
        shape = image_file_shape(store, name, any_size)
        if shape[:2] != first[:2] and not any_size:
            raise size_mismatch(store, name, shape, first)
        channels = max(channels, shape[2])  # one folder may hold scans in colour and in grey
    return (*first[:2], channels)


def with_colour(store: Store, names: list[str], first: tuple[int, int, int], any_size: bool) -> tuple[int, int, int]:
    """The first file's (H, W, C), with C = 3 if any file is in colour. Raises FileFormatError if a file cannot be opened."""
    if first[2] == 3 or not any(_is_colour(store, name, any_size) for name in names):
        return first
    return (*first[:2], 3)


def _is_colour(store: Store, name: str, any_size: bool) -> bool:
    try:
        head = store.head(name, _PNG_HEADER)
    except UNREADABLE as error:
        raise _unreadable(store, name, error) from error
    # The 26th byte of a PNG is its colour type. Pillow reads the whole file, which takes ten times as long, and there may be a
    # million.
    if head.startswith(_PNG) and len(head) == _PNG_HEADER:
        return head[-1] not in _PNG_GREY
    try:
        return image_file_shape(store, name, any_size)[2] == 3
    except FileFormatError:
        return False  # an error when it is read; 'data check' lists all such files


def in_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Convert [H, W, C] to 1 or 3 channels. Grey is the luma of ITU-R BT.601, as in Pillow."""
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return image.repeat(3, axis=2)
    return np.asarray(to_pil(image).convert("L"))[:, :, None]


def crop_and_resize(image: np.ndarray, resolution: int) -> np.ndarray:
    """The largest centred square of [H, W, C], resized with Lanczos: uint8 [resolution, resolution, C]."""
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = image[top : top + side, left : left + side]
    if side == resolution:
        return square
    resized = np.asarray(to_pil(square).resize((resolution, resolution), Image.Resampling.LANCZOS))
    return resized.reshape(resolution, resolution, image.shape[2])


def is_image_file(name: str) -> bool:
    """Whether a file name has the suffix of an image and is not hidden."""
    return has_suffix(name, IMAGE_SUFFIXES)


def _opened(store: Store, name: str, any_size: bool) -> Image.Image:
    with _WARNING_FILTERS, warnings.catch_warnings():
        # Pillow only warns about images of up to twice its limit on pixels. A data set can use images of that size only if they
        # are resized.
        warnings.simplefilter("ignore" if any_size else "error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(store.read(name)))
        except Image.DecompressionBombWarning as error:
            raise ValueError("it is too large; resize it with --resolution") from error
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error


def _channels(image: Image.Image) -> int:
    if _is_deep(image):
        return 1
    # For 32-bit integers and for floats, the value of white is not known.
    if image.mode not in _GREY_MODES | _COLOUR_MODES:
        raise ValueError(f"pixels of mode {image.mode} have neither 8 nor 16 bits")
    return 1 if image.mode in _GREY_MODES else 3


def _is_deep(image: Image.Image) -> bool:
    return image.mode in _DEEP_MODES or (image.mode == "I" and image.format == "PPM")


_REMEDIES = {PermissionError: "make it readable, or remove it", FileNotFoundError: "put it back, or remove the link to it"}


def _unreadable(store: Store, name: str, error: BaseException) -> FileFormatError:
    reason, remedy = reason_of(error), "replace or remove that file"
    if isinstance(error, OSError) and error.strerror:  # an error of the system, not of Pillow
        reason = error.strerror
        remedy = _REMEDIES.get(type(error), remedy)
    if isinstance(error, Image.UnidentifiedImageError):
        reason, head = "not an image", store.head(name, 2 * HEAD)
        # Phones and photo programs also name such files .jpg.
        if begins_as_heic(head):
            reason, remedy = "HEIC, which is not supported", SAVE_HEIC
        elif begins_as_lfs(head):
            reason, remedy = FileType.LFS.value, PULL_LFS
        elif not head:
            reason = "it is empty"
    return FileFormatError(f"{name_in_store(store, name)} cannot be read: {reason}", remedy=remedy)


def size_mismatch(store: Store, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> FileFormatError:
    """The error for a file of `shape` (H, W, C) among others of `expected`."""

    def text(shape: tuple[int, ...]) -> str:
        return f"{shape[1]}x{shape[0]}{_COLOURS.get(shape[2], '')}"

    way = "size with 'uni-instruct data prepare --resolution'"
    if tuple(shape[:2]) == tuple(expected[:2]):
        way = "form with 'uni-instruct data prepare --channels'"
    return FileFormatError(
        f"{name_in_store(store, name)} is {text(shape)}, other images are {text(expected)}", remedy=f"bring them to one {way}"
    )
