"""Check a data set: read every image and label, and report each file that is wrong."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from uni_instruct.data.cifar10 import has_cifar10
from uni_instruct.data.class_folders import folder_classes
from uni_instruct.data.edm_zip import ZIP_REMEDY, stated_channels
from uni_instruct.data.file_kinds import DataFiles, ImageForm, data_files
from uni_instruct.data.folder import FOLDER_REMEDY
from uni_instruct.data.idx import has_idx
from uni_instruct.data.image_files import decode, size_mismatch
from uni_instruct.data.labels import META, label_entries, label_mismatches, read_meta, stated_classes
from uni_instruct.data.sources import is_data, is_named, is_npz, is_zip, no_such_data, open_dataset, source_parts
from uni_instruct.data.storage import FolderStore, Store, ZipStore, name_in_store
from uni_instruct.data.tar_files import TarStore, has_class_members, has_tars, is_tar, tar_images
from uni_instruct.data.vae_latents import read_moments
from uni_instruct.errors import FileFormatError
from uni_instruct.system.progress import ProgressFactory, silent

Shape = tuple[int, ...]


class WrongFile(NamedTuple):
    """A file that is wrong ('' if the whole source is). problem: a sentence that names the file and the source."""

    source: str
    file: str
    problem: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of `check_data`: how many images were read, the wrong files in order, and the note if none is wrong."""

    images: int
    wrong: tuple[WrongFile, ...]
    note: str = ""


def check_data(
    source: str, resolution: int | None = None, channels: int | None = None, with_progress: ProgressFactory = silent
) -> Findings:
    """Read every image and label of a source that `open_dataset` takes.

    A file is wrong if it cannot be read, if its size is not the most common one (with a resolution all sizes are allowed,
    because images are resized to it), or if its label is missing, not a class, or outside the stated classes.
    Raises RequestError if the source does not exist.
    """
    parts = source_parts(source)
    for part in parts:
        if not is_data(part):
            raise no_such_data(part)
    form = ImageForm(resolution=resolution, channels=channels)
    images, wrong = 0, list[WrongFile]()
    for part in parts:
        found = _check_part(part, form, with_progress)
        images, wrong = images + found.images, [*wrong, *found.wrong]
    if not wrong:
        # Some faults appear only when all parts are opened together, such as two parts with different classes.
        try:
            dataset = open_dataset(source, resolution, channels=channels)
        except FileFormatError as error:
            return Findings(images=images, wrong=(WrongFile(source, "", error.problem),))
        return Findings(images=len(dataset), wrong=(), note=dataset.note)
    return Findings(images=images, wrong=tuple(wrong))


def _check_part(source: str, form: ImageForm, with_progress: ProgressFactory) -> Findings:
    path = Path(source)
    try:
        opened = None if is_named(source) else _store(path)
        if opened is None:
            return Findings(images=0, wrong=())  # arrays: `open_dataset` checks all of them when it opens them
        store, names, (files, latents, _) = opened
    except FileFormatError as error:
        return Findings(images=0, wrong=(WrongFile(source, "", error.problem),))
    wrong: list[WrongFile] = []
    any_size = form.resolution is not None
    by_shape: dict[Shape, list[str]] = {}
    with with_progress(f"check {source}", len(files), "images") as progress:
        for file in files:
            try:
                shape = _latent_shape(store, file) if latents else decode(store, file, any_size).shape
                by_shape.setdefault(shape, []).append(file)
            except FileFormatError as error:
                wrong.append(WrongFile(source, file, error.problem))
            progress.advance(1)
    grey = form.channels is None and next(iter(by_shape), ())[2:] == (1,) and _is_stated_grey(store, names)
    wrong += [] if any_size else _wrong_sizes(store, by_shape, grey)
    # Only `open_dataset` joins several tars into one tree of files, so it checks their labels, and .cls members too.
    checked_later = isinstance(store, TarStore) and (has_class_members(store) or path.is_dir())
    wrong += [] if checked_later else _label_problems(store, files, names)
    places = {name: place for place, name in enumerate(files)}
    return Findings(images=len(files), wrong=tuple(sorted(wrong, key=lambda one: places.get(one.file, -1))))


def _store(path: Path) -> tuple[Store, list[str], DataFiles] | None:
    """The store of a source as `open_dataset` opens it, all its file names, and its data files; None for sources of arrays."""
    is_folder = path.is_dir()
    if has_cifar10(path) or (has_idx(path) if is_folder else is_npz(path)):
        return None
    if has_tars(path) if is_folder else not is_zip(path) and is_tar(path):
        tars = TarStore(path)
        return tars, tars.names(), tar_images(tars)
    if not is_folder and not is_zip(path):
        return None
    store: Store = FolderStore(path) if is_folder else ZipStore(path)
    names = store.names()
    return store, names, data_files(store, names, FOLDER_REMEDY if is_folder else ZIP_REMEDY)


def _is_stated_grey(store: Store, names: list[str]) -> bool:
    """Whether a zip's `dataset.json` states a shape of one channel. `open_zip` then expects it of all images."""
    try:
        return isinstance(store, ZipStore) and stated_channels(read_meta(store, names)) == 1
    except FileFormatError:
        return False  # `_label_problems` reports it


def _wrong_sizes(store: Store, by_shape: dict[Shape, list[str]], grey: bool) -> Iterator[WrongFile]:
    """Yield files whose (H, W) is not the most common one.

    Grey among colour is allowed, because all images become colour. grey: the images must be grey, so colour is wrong.
    """
    numbers: Counter[Shape] = Counter()
    for shape, files in by_shape.items():
        numbers[shape[:2]] += len(files)
    # The most common shape, not the first file's: one stray image at the start would make all the others wrong.
    common = numbers.most_common(1)[0][0] if numbers else ()
    example = (*common, 1) if grey else next((shape for shape in by_shape if shape[:2] == common), ())
    for shape, files in by_shape.items():
        if shape[:2] != common or (grey and shape[2:] == (3,)):
            yield from (WrongFile(str(store.path), file, size_mismatch(store, file, shape, example).problem) for file in files)


def _label_problems(store: Store, files: list[str], names: list[str]) -> Iterator[WrongFile]:
    source = str(store.path)
    try:
        meta = read_meta(store, names)
        by_file, stated = label_entries(store, meta), stated_classes(store, meta)
    except FileFormatError as error:
        yield WrongFile(source, META, error.problem)
        return
    for mismatch in label_mismatches(by_file, files, stated) if by_file is not None else ():
        yield WrongFile(source, mismatch.file, f"{name_in_store(store, mismatch.file)} {mismatch.problem}")
    if not meta.has_labels:
        try:
            folder_classes(store, files)
        except FileFormatError as error:
            yield WrongFile(source, "", error.problem)


def _latent_shape(store: Store, file: str) -> Shape:
    channels, height, width = read_moments(store, file).shape
    return height, width, channels
