"""What a folder or zip holds: image files, or where there are none, latents; and what else, which is passed over."""

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

from uni_instruct.data.dataset import Dataset, ImageReader
from uni_instruct.data.image_files import (
    SEVERAL,
    ImageFileReader,
    common_shape,
    holds_several,
    image_file_shape,
    is_image_file,
    with_colour,
)
from uni_instruct.data.labels import META, RECORD, Description
from uni_instruct.data.storage import UNREADABLE, FolderStore, Store, naturally_sorted
from uni_instruct.data.vae_latents import CHANNELS, LatentReader, is_latent, read_moments
from uni_instruct.errors import FileFormatError, RequestError
from uni_instruct.file_type import HEAD, SAVE_HEIC, begins_as_heic, begins_as_image, import_of_weights
from uni_instruct.printable import counted, joined_notes, printable
from uni_instruct.spec import ImageShape

_LOOKED_AT = 256
# Names under which people keep labels in other forms.
_OF_LABELS = re.compile(r"(?:label|metadata|annotation)[^/]*$|\.(?:csv|tsv|jsonl)$", re.IGNORECASE)

_TAKEN = frozenset({".zip", ".npz", ".tar"})
_ARCHIVES = _TAKEN | {".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
_CONTAINERS = frozenset({".parquet", ".arrow", ".feather", ".tfrecord", ".h5", ".hdf5", ".mdb", ".mat", ".beton"})


@dataclass(frozen=True, kw_only=True)
class Content:
    """The fields of a Dataset that its files themselves give."""

    image_shape: ImageShape
    reader: ImageReader
    latents: bool = False
    note: str = ""


class DataFiles(NamedTuple):
    """A store's images, or latents, in natural order, and the names of what is neither."""

    files: list[str]
    latents: bool
    passed_over: list[str]


@dataclass(frozen=True, kw_only=True)
class ImageForm:
    """What images are brought to: resolution pixels a side, after a centred crop, and channels, 1 or 3. None keeps theirs."""

    resolution: int | None = None
    channels: int | None = None


AS_THEY_ARE = ImageForm()


def data_files(store: Store, names: list[str], remedy: str) -> DataFiles:
    """The image files in natural order, or where there are none the latents.

    A file whose name says nothing is an image where it begins as one. Raises FileFormatError where there is neither.
    """
    # Images win: an .npy among them is some other array, whereas among latents there are no images.
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


def passed_over_note(found: DataFiles, store: Store, unlabelled: bool) -> str:
    """What was not read, counted and named; empty where everything was. unlabelled: nothing has said what classes there are."""
    others = naturally_sorted([*found.passed_over, *store.no_files])
    labels = next((name for name in others if _OF_LABELS.search(name)), None) if unlabelled else None
    return joined_notes(
        f"{counted(others, 'file')} passed over, as no {'latents' if found.latents else 'images'}" if others else "",
        f"classes are read from {META} or folders, not from {printable(labels)}" if labels is not None else "",
        f"{counted(store.repeated, 'name')} passed over, as repeating others" if store.repeated else "",
    )


def _remedy_for_others(store: Store, names: list[str]) -> str:
    """What to do about files that hold images in another way, or weights; empty where there are none."""
    if isinstance(store, FolderStore) and (command := import_of_weights(store.path)):
        return f"give data, or take the weights there with {command}"
    for name in naturally_sorted(names):
        suffix = os.path.splitext(name)[1].lower()
        if suffix in _ARCHIVES:
            taken = isinstance(store, FolderStore) and suffix in _TAKEN
            return f"give {store.path / name} itself" if taken else f"unpack {printable(name)}"
        if suffix in _CONTAINERS:
            return f"write the images of {printable(name)} to files, PNG or JPEG, in a sub-folder for each class"
    return ""


def _is_image(store: Store, name: str) -> bool:
    if is_image_file(name):
        return True
    base = name.rpartition("/")[2]
    suffix = os.path.splitext(base)[1]
    # '.mp4' or '.csv' says what a file is; '1', '1.jpg_large' and '1.12' do not.
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

    The first file's size is taken for all; grey among colour becomes colour, wherever it stands. every_header: sizes of image
    files are compared now, and not when they are read. stated: the channels that whoever wrote the files has noted.
    Raises FileFormatError where they differ, RequestError where latents are to be resized.
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
    return Content(image_shape=(channels, height, width), reader=reader, note=_several_note(store, files))


def dataset_of(content: Content, description: Description, passed_over: str) -> Dataset:
    """The data set of what the files give and what is said of them. Raises FileFormatError where these do not fit."""
    said = vars(description) | {"note": joined_notes(description.note, passed_over, content.note)}
    return Dataset(**(vars(content) | said))


def _several_note(store: Store, files: list[str]) -> str:
    """What to say of films and of scans of many pages, whose first picture alone is read."""
    may = [name for name in files if name.endswith(SEVERAL)]
    # Evenly spaced: to open a million would take minutes.
    looked_at = [may[place * len(may) // _LOOKED_AT] for place in range(_LOOKED_AT)] if len(may) > _LOOKED_AT else may
    several = [name for name in looked_at if holds_several(store, name)]
    least = "at least " if len(may) > len(looked_at) else ""
    shown = counted(several, "moving or paged image")
    return f"{least}{shown}: only the first picture of each is read" if several else ""
