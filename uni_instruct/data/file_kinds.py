"""Which files of a folder or zip are data: images, or latents if there are no images. Others are skipped and reported."""

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

from uni_instruct.data.dataset import Dataset, ImageReader
from uni_instruct.data.image_files import (
    MULTI_IMAGE_SUFFIXES,
    ImageFileReader,
    common_shape,
    has_several_images,
    image_file_shape,
    is_image_file,
    with_colour,
)
from uni_instruct.data.labels import META, RECORD, Description
from uni_instruct.data.storage import UNREADABLE, FolderStore, Store, naturally_sorted
from uni_instruct.data.vae_latents import CHANNELS, LatentReader, is_latent, read_moments
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.spec import ImageShape
from uni_instruct.system.file_type import HEAD, SAVE_HEIC, begins_as_heic, begins_as_image, import_of_weights
from uni_instruct.system.printable import counted, joined_notes, printable

_MAX_OPENED = 256
# Names of files that hold labels in other formats.
_LABEL_FILE = re.compile(r"(?:label|metadata|annotation)[^/]*$|\.(?:csv|tsv|jsonl)$", re.IGNORECASE)

_OPENABLE_SUFFIXES = frozenset({".zip", ".npz", ".tar"})
_ARCHIVE_SUFFIXES = _OPENABLE_SUFFIXES | {".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
_CONTAINER_SUFFIXES = frozenset({".parquet", ".arrow", ".feather", ".tfrecord", ".h5", ".hdf5", ".mdb", ".mat", ".beton"})


@dataclass(frozen=True, kw_only=True)
class Content:
    """The fields of a Dataset that come from its files."""

    image_shape: ImageShape
    reader: ImageReader
    latents: bool = False
    note: str = ""


class DataFiles(NamedTuple):
    """A store's images, or latents, in natural order; and the names of all other files."""

    files: list[str]
    latents: bool
    skipped: list[str]


@dataclass(frozen=True, kw_only=True)
class ImageForm:
    """What images are converted to. resolution: pixels a side, after a centred crop. channels: 1 or 3. None: unchanged."""

    resolution: int | None = None
    channels: int | None = None


AS_THEY_ARE = ImageForm()


def data_files(store: Store, names: list[str], remedy: str) -> DataFiles:
    """The image files in natural order, or the latents if there are no images. remedy: for the error if there are neither.

    A file whose name has no known suffix is an image if its content begins like one. Raises FileFormatError if there are
    neither.
    """
    # Images first: an .npy among images is some other array, but there are no images among latents.
    for latents in (False, True):
        chosen = [name for name in names if (is_latent(name) if latents else _is_image(store, name))]
        if chosen:
            taken = set(chosen)
            rest = [name for name in names if name not in taken and name.rpartition("/")[2] not in (META, RECORD)]
            return DataFiles(naturally_sorted(chosen), latents, naturally_sorted(rest))
    if any(begins_as_heic(_head(store, name)) for name in names):
        remedy = SAVE_HEIC
    remedy = _remedy_for_others(store, names) or remedy
    there = f" but {counted(naturally_sorted(names), 'file')}" if names else ""
    raise FileFormatError(f"{store.path} has no images{there}", remedy=remedy)


def skipped_note(found: DataFiles, store: Store, unlabelled: bool) -> str:
    """A note that counts and names the skipped files; '' if there are none. unlabelled: nothing states the classes."""
    others = naturally_sorted([*found.skipped, *store.special_files])
    labels = next((name for name in others if _LABEL_FILE.search(name)), None) if unlabelled else None
    return joined_notes(
        f"{counted(others, 'file')} skipped: not {'latents' if found.latents else 'images'}" if others else "",
        f"classes are read from {META} or folders, not from {printable(labels)}" if labels is not None else "",
        f"{counted(store.repeated, 'name')} skipped: already present" if store.repeated else "",
    )


def _remedy_for_others(store: Store, names: list[str]) -> str:
    """The remedy for files that hold images in another way, or weights; '' if there are none."""
    if isinstance(store, FolderStore) and (command := import_of_weights(store.path)):
        return f"give a data set, or import the weights there with {command}"
    for name in naturally_sorted(names):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in _ARCHIVE_SUFFIXES:
            taken = isinstance(store, FolderStore) and suffix in _OPENABLE_SUFFIXES
            return f"give {store.path / name} itself" if taken else f"unpack {printable(name)}"
        if suffix in _CONTAINER_SUFFIXES:
            return f"write the images of {printable(name)} to files, PNG or JPEG, in a sub-folder for each class"
    return ""


def _is_image(store: Store, name: str) -> bool:
    if is_image_file(name):
        return True
    base = name.rpartition("/")[2]
    suffix = os.path.splitext(base)[1]
    # '.mp4' and '.csv' say what a file is. '1', '1.jpg_large' and '1.12' do not, so the content decides.
    if base.startswith(".") or (suffix and suffix[1:2].isalpha() and suffix[1:].isalnum()):
        return False
    return begins_as_image(_head(store, name))


def _head(store: Store, name: str) -> bytes:
    try:
        return store.head(name, HEAD)
    except UNREADABLE:
        return b""


def content_of(store: Store, found: DataFiles, form: ImageForm, *, every_header: bool, stated: int | None = None) -> Content:
    """Shape and reader of the files.

    All files must have the first file's size. If any image is in colour, all become colour. every_header: compare the sizes of
    image files now, not when they are read. stated: the number of channels that the writer of the files noted.
    Raises FileFormatError if sizes differ, RequestError if latents are to be resized.
    """
    files, resolution = found.files, form.resolution
    if found.latents:
        if resolution is not None or form.channels is not None:
            raise RequestError(
                f"{store.path} holds latents, which cannot be resized", remedy="resize the images, then encode them"
            )
        height, width = read_moments(store, files[0]).shape[1:]
        return Content(image_shape=(CHANNELS, height, width), reader=LatentReader(store, files, (height, width)), latents=True)
    any_size = resolution is not None
    if every_header:
        shape = common_shape(store, files, any_size)
    else:
        shape = image_file_shape(store, files[0], any_size)
        shape = shape if (form.channels or stated) == shape[2] else with_colour(store, files, shape, any_size)
    height, width = (resolution, resolution) if resolution is not None else shape[:2]
    channels = form.channels or shape[2]
    reader = ImageFileReader(store, files, (height, width), channels, resize=any_size, recolour=form.channels is not None)
    return Content(image_shape=(channels, height, width), reader=reader, note=_multi_image_note(store, files))


def dataset_of(content: Content, description: Description, skipped: str) -> Dataset:
    """Put a data set together from its files' content and description. Raises FileFormatError if these do not fit."""
    fields = vars(description) | {"note": joined_notes(description.note, skipped, content.note)}
    return Dataset(**(vars(content) | fields))


def _multi_image_note(store: Store, files: list[str]) -> str:
    """A note on animations and scans of many pages, of which only the first picture is read; '' if there are none."""
    may = [name for name in files if name.endswith(MULTI_IMAGE_SUFFIXES)]
    # An evenly spaced sample: opening a million files would take minutes.
    looked_at = [may[place * len(may) // _MAX_OPENED] for place in range(_MAX_OPENED)] if len(may) > _MAX_OPENED else may
    several = [name for name in looked_at if has_several_images(store, name)]
    least = "at least " if len(may) > len(looked_at) else ""
    shown = counted(several, "file")
    return f"{least}{shown} with several pictures: only the first of each is read" if several else ""
