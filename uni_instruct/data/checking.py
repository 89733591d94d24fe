"""check_data: reads everything a data set has and names each file that is wrong."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from uni_instruct.data.edm_zip import ZIP_REMEDY
from uni_instruct.data.file_kinds import data_files
from uni_instruct.data.folder import FOLDER_REMEDY, folder_classes
from uni_instruct.data.idx import has_idx
from uni_instruct.data.image_files import decode, mixed
from uni_instruct.data.labels import META, label_entries, misfits, read_meta, stated_classes
from uni_instruct.data.sources import is_data, is_named, is_zip, no_data, open_dataset, source_parts
from uni_instruct.data.storage import FolderStore, Store, ZipStore, placed
from uni_instruct.data.vae_latents import read_moments
from uni_instruct.errors import FileFormatError
from uni_instruct.progress import ProgressFactory, silent

Shape = tuple[int, ...]


class Wrong(NamedTuple):
    """A file that is wrong, the source it is in, and what is wrong, a sentence that names both."""

    source: str
    file: str
    problem: str


@dataclass(frozen=True, kw_only=True)
class Findings:
    """How many images were read, and what is wrong, in the files' order."""

    images: int
    wrong: tuple[Wrong, ...]


def check_data(source: str, resolution: int | None = None, with_progress: ProgressFactory = silent) -> Findings:
    """Reads every image and label of whatever `open_dataset` takes.

    Wrong is a file that cannot be read, that is of another size than most (not with a resolution, to which all are brought), or
    in a zip of other channels; whose label is missing, no class, or outside the classes that are stated. What only shows when
    all is opened together comes last. Raises RequestError for a source that is not there.
    """
    parts = source_parts(source)
    for part in parts:
        if not is_data(part):
            raise no_data(part)
    images, wrong = 0, list[Wrong]()
    for part in parts:
        found = _check_part(part, resolution, with_progress)
        images, wrong = images + found.images, [*wrong, *found.wrong]
    if not wrong:
        try:
            dataset = open_dataset(source, resolution)
        except FileFormatError as error:
            return Findings(images=images, wrong=(Wrong(source, "", error.problem),))
        images = len(dataset)
    return Findings(images=images, wrong=tuple(wrong))


def _check_part(source: str, resolution: int | None, with_progress: ProgressFactory) -> Findings:
    path = Path(source)
    is_folder = path.is_dir() and not has_idx(path)
    if is_named(source) or not (is_folder or (path.is_file() and is_zip(path))):
        return Findings(images=0, wrong=())  # arrays, which are whole once they are open
    try:
        store: Store = FolderStore(path) if is_folder else ZipStore(path)
        names = store.names()
        files, latents = data_files(store, names, FOLDER_REMEDY if is_folder else ZIP_REMEDY)
    except FileFormatError as error:
        return Findings(images=0, wrong=(Wrong(source, "", error.problem),))
    wrong: list[Wrong] = []
    by_shape: dict[Shape, list[str]] = {}
    with with_progress(f"check {source}", len(files), "images") as progress:
        for file in files:
            try:
                shape = _latent_shape(store, file) if latents else decode(store, file).shape
                by_shape.setdefault(shape, []).append(file)
            except FileFormatError as error:
                wrong.append(Wrong(source, file, error.problem))
            progress.advance(1)
    wrong += _odd_ones(store, by_shape, any_size=resolution is not None, any_channels=is_folder)
    wrong += _label_problems(store, files, names)
    if is_folder and META not in names:
        wrong += _folder_problems(path, files)
    places = {name: place for place, name in enumerate(files)}
    return Findings(images=len(files), wrong=tuple(sorted(wrong, key=lambda one: places.get(one.file, -1))))


def _odd_ones(store: Store, by_shape: dict[Shape, list[str]], *, any_size: bool, any_channels: bool) -> Iterator[Wrong]:
    """Files of another (H, W, C) than most, as far as it matters. Folders may mix grey and colour, which become colour."""

    def matters(shape: Shape) -> tuple[Shape, Shape]:
        return () if any_size else shape[:2], () if any_channels else shape[2:]

    numbers: Counter[tuple[Shape, Shape]] = Counter()
    for shape, files in by_shape.items():
        numbers[matters(shape)] += len(files)
    common = numbers.most_common(1)[0][0] if numbers else ((), ())
    example = next((shape for shape in by_shape if matters(shape) == common), ())
    for shape, files in by_shape.items():
        if matters(shape) != common:
            yield from (Wrong(str(store.path), file, mixed(store, file, shape, example).problem) for file in files)


def _label_problems(store: Store, files: list[str], names: list[str]) -> Iterator[Wrong]:
    source = str(store.path)
    try:
        meta = read_meta(store, names)
        by_file, stated = label_entries(store, meta), stated_classes(store, meta)
    except FileFormatError as error:
        yield Wrong(source, META, error.problem)
        return
    for misfit in misfits(by_file, files, stated) if by_file is not None else ():
        yield Wrong(source, misfit.file, f"{placed(store, misfit.file)} {misfit.problem}")


def _folder_problems(path: Path, files: list[str]) -> Iterator[Wrong]:
    try:
        folder_classes(path, files)
    except FileFormatError as error:
        yield Wrong(str(path), "", error.problem)


def _latent_shape(store: Store, file: str) -> Shape:
    channels, height, width = read_moments(store, file).shape
    return height, width, channels
