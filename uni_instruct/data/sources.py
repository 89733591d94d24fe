"""open_dataset: open anything that a user may name as a data set."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from uni_instruct.data.cifar10 import has_cifar10, open_cifar10
from uni_instruct.data.concat import concatenated, with_classes
from uni_instruct.data.dataset import MAX_CLASSES, ArrayReader, Dataset, number_names
from uni_instruct.data.edm_zip import open_zip
from uni_instruct.data.emoji import open_emoji
from uni_instruct.data.fashion_mnist import open_fashion_mnist, with_fashion_mnist_names
from uni_instruct.data.file_kinds import ImageForm
from uni_instruct.data.folder import open_folder
from uni_instruct.data.idx import has_idx, open_idx, skipped_idx_note
from uni_instruct.data.image_files import crop_and_resize, in_channels
from uni_instruct.data.labels import first_label_note
from uni_instruct.data.storage import UNREADABLE
from uni_instruct.data.tar_files import has_tars, is_tar, open_tars
from uni_instruct.errors import FileFormatError, MissingExtraError, RequestError
from uni_instruct.system.file_type import CHECKPOINTS, FileType, file_type
from uni_instruct.system.printable import counted, joined_notes

MAX_RESOLUTION = 4096
_EMOJI_OF = "emoji:"
_FILE_KINDS = "a zip, an .npz, a folder of images, of tars or of IDX files, a tar, CIFAR-10's archive for Python"


def open_dataset(
    source: str | Path, resolution: int | None = None, num_classes: int | None = None, channels: int | None = None
) -> Dataset:
    """Open a data set by name (DATASETS), or a zip, tar, .npz or CIFAR-10's archive, or a folder of images, tars or IDX files.

    Several sources, separated by commas, are joined into one ('a.zip,b.zip'). `emoji:FONT` draws the emoji of that font file. A
    name is preferred to a file or folder of the same name; write a path such as './digits' for the latter.
    resolution: centre-crop every image to a square and resize it to this many pixels. num_classes: the number of classes, if
    the last of them have no images. channels: convert every image to grey (1) or colour (3).
    Raises RequestError for an unknown source or an option out of range, FileFormatError for a source that is corrupt or of an
    unknown type.
    """
    if resolution is not None and not 1 <= resolution <= MAX_RESOLUTION:
        raise RequestError(
            f"resolution {resolution} is out of range", remedy=f"give 1 to {MAX_RESOLUTION} pixels", param="resolution"
        )
    if num_classes is not None and not 1 <= num_classes <= MAX_CLASSES:
        raise RequestError(f"num_classes {num_classes} is out of range", remedy=f"give 1 to {MAX_CLASSES}", param="num_classes")
    if channels is not None and channels not in (1, 3):
        raise RequestError(
            f"channels {channels} is neither 1 nor 3", remedy="give 1 for grey or 3 for colour", param="channels"
        )
    form = ImageForm(resolution=resolution, channels=channels)
    parts = [_open_one(part, form) for part in source_parts(source)]
    return concatenated([part if num_classes is None else with_classes(part, num_classes) for part in parts])


def source_parts(source: str | Path) -> list[str]:
    """Split a list of sources at its commas. A path that exists is not split, even if its name has a comma."""
    # Paths with commas were valid before there were lists, so a file that exists is preferred.
    text = str(source)
    whole = "," not in text or Path(text.removeprefix(_EMOJI_OF)).exists()
    return [text] if whole else [part.strip() for part in text.split(",") if part.strip()] or [text]


def is_data(source: str) -> bool:
    """Whether a source, or one of several separated by commas, is a known name or an existing file or folder."""
    return any(is_named(part) or _exists(part) for part in source_parts(source))


def _exists(source: str) -> bool:
    """Whether a file or folder exists. Devices and pipes do not count, because they may have no end.

    An empty source does not count either, for example a script's empty variable. Path would take it as the working folder.
    """
    return bool(source) and (Path(source).is_file() or Path(source).is_dir())


def is_named(source: str) -> bool:
    """Whether one source is a name of DATASETS or `emoji:FONT`, which are preferred to files of that name."""
    return source in DATASETS or source.startswith(_EMOJI_OF)


def no_such_data(source: str) -> RequestError:
    """The error for a source that does not exist."""
    remedy = f"give one of {', '.join(DATASETS)}, or {_FILE_KINDS}"
    return RequestError(f"there is no data set {source or 'without a name'}", remedy=remedy, param="source")


def _open_one(source: str, form: ImageForm) -> Dataset:
    # Names before paths: './digits' can name the folder, but nothing else could name the data set.
    if source in DATASETS:
        return _in_form(DATASETS[source](), form)
    if source.startswith(_EMOJI_OF):
        return _in_form(open_emoji(Path(source.removeprefix(_EMOJI_OF)).expanduser()), form)
    path = Path(source)
    if not _exists(source):
        raise no_such_data(source)
    if path.is_dir() and has_idx(path):
        dataset = with_fashion_mnist_names(open_idx(path))
        return _in_form(replace(dataset, note=joined_notes(dataset.note, skipped_idx_note(path))), form)
    if has_cifar10(path):
        return _in_form(open_cifar10(path), form)
    if path.is_dir() and has_tars(path):
        return open_tars(path, form)
    if path.is_dir():
        return open_folder(path, form)
    if is_npz(path):
        return _in_form(open_npz(path), form)
    if is_zip(path):
        return open_zip(path, form)
    if is_tar(path):
        return open_tars(path, form)
    raise FileFormatError(f"{path} is not a data set{type_and_advice(path)}", remedy=f"give {_FILE_KINDS}", param="source")


def is_zip(path: Path) -> bool:
    """Whether a file is a zip of images, or named .zip and no Git LFS pointer: then the error says that the zip is damaged."""
    kind = file_type(path)
    return kind is FileType.ZIP or (path.suffix.lower() == ".zip" and kind is not FileType.LFS)


def is_npz(path: Path) -> bool:
    """Whether a file is an .npz, or is named .npz and its content is of no other known type."""
    kind = file_type(path)
    named = path.suffix.lower() == ".npz"
    return kind is FileType.NPZ or (named and kind in (FileType.OTHER, FileType.EMPTY))


def type_and_advice(path: Path) -> str:
    """' but ...': the type of a file that is not a data set, and what can be done with it; '' if the type is unknown."""
    kind = file_type(path)
    if kind in CHECKPOINTS:
        return f" but {kind.value}, which 'uni-instruct inspect' and 'import' take"
    advice = {
        FileType.TAR: "which must be unpacked first",
        FileType.IDX: "whose folder is the data set",
        FileType.IMAGE: "whose folder is the data set",
        FileType.ARRAY: "which must be saved as arr_0 of an .npz",
        FileType.TABLE: "whose images must be saved as files, in a folder for each class",
        FileType.PACKED: "which must be unpacked first",
        FileType.LFS: "whose file 'git lfs pull' fetches",
    }
    return f" but {kind.value}, {advice[kind]}" if kind in advice else ""


def open_digits() -> Dataset:
    """scikit-learn's digits: 1,797 grey images of 8x8, their 17 levels scaled to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingExtraError("scikit-learn", extra="train") from error
    digits = load_digits()
    return Dataset(
        name="digits",
        image_shape=(1, 8, 8),
        labels=digits.target.astype(np.int64),
        num_classes=10,
        class_names=number_names(10),
        licence="CC-BY-4.0",
        source="scikit-learn (UCI Optical Recognition of Handwritten Digits)",
        reader=ArrayReader(np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, :, :, None]),
    )


def open_npz(path: Path) -> Dataset:
    """Samples as `generate`, ADM's tools and others write them: arr_0, uint8 [N, H, W, 1 or 3], and classes if there are any.

    Classes are integers [N] named class_ids, labels or arr_1 (ADM's name). All arrays are loaded into memory.
    Raises FileFormatError if an array is missing or of another type or shape.
    """
    arrays = read_npz(path, ("arr_0", *_NPZ_CLASSES))
    images, others = arrays.get("arr_0"), _other_arrays(path)
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        held = f" but {counted(others, 'array')}" if others else ""
        found = f"no arr_0{held}" if images is None else f"arr_0 of {images.dtype} {list(images.shape)}"
        raise FileFormatError(f"{path} has {found}", remedy="save the images as arr_0, uint8 [N, H, W, 1 or 3]")
    class_ids = _npz_classes(path, arrays)
    num_classes = 0 if class_ids is None else int(class_ids.max()) + 1
    return Dataset(
        name=path.stem,
        image_shape=(images.shape[3], *images.shape[1:3]),
        labels=class_ids,
        num_classes=num_classes,
        class_names=number_names(num_classes),
        licence="unknown",
        source=str(path),
        reader=ArrayReader(images),
        note=joined_notes(
            "" if class_ids is None else first_label_note(class_ids),
            f"{counted(others, 'array')} skipped{'' if class_ids is not None else _NPZ_REMARK}" if others else "",
        ),
    )


_NPZ_CLASSES = ("class_ids", "labels", "arr_1")
_NPZ_REMARK = f": classes are integers [N] called {', '.join(_NPZ_CLASSES[:-1])} or {_NPZ_CLASSES[-1]}"
# Arrays that `generate` writes beside images and classes.
_NPZ_RECORD = ("seeds", "request")


def _other_arrays(path: Path) -> list[str]:
    """The names of the arrays that are not read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
    except UNREADABLE:
        return []  # `read_npz` reports the error
    classes = next(((name,) for name in _NPZ_CLASSES if name in names), ())
    return [name for name in names if name not in ("arr_0", *classes, *_NPZ_RECORD)]


def _npz_classes(path: Path, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    name = next((name for name in _NPZ_CLASSES if name in arrays), None)
    class_ids = arrays.get(name or "")
    if class_ids is None:
        return None
    if class_ids.dtype.kind not in "iu" or class_ids.ndim != 1 or not class_ids.size:
        if name == "arr_1":  # NumPy's name for any second array, which may be something else
            return None
        raise FileFormatError(
            f"{path} has {name} of {class_ids.dtype} {list(class_ids.shape)}", remedy="save them as integers [N]"
        )
    if class_ids.max() >= MAX_CLASSES:
        raise FileFormatError(f"{path} has class id {class_ids.max()}", remedy=f"use ids below {MAX_CLASSES}")
    return class_ids.astype(np.int64)


def read_npz(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an .npz holds. Nothing in it is executed. Raises FileFormatError if it is corrupt."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}
    except UNREADABLE as error:
        raise FileFormatError(f"{path} is not a whole .npz: {error}", remedy="write or copy it again") from error


def _in_form(dataset: Dataset, form: ImageForm) -> Dataset:
    channels, height, width = dataset.image_shape
    wanted = form.channels or channels, form.resolution or height, form.resolution or width
    if wanted == dataset.image_shape:
        return dataset
    return replace(dataset, image_shape=wanted, reader=_FormReader(dataset, form))


class _FormReader:
    def __init__(self, dataset: Dataset, form: ImageForm):
        self.dataset = dataset
        self.form = form

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: np.ndarray) -> np.ndarray:
        images = list(self.dataset.images(indices))
        if self.form.resolution is not None:
            images = [crop_and_resize(image, self.form.resolution) for image in images]
        return np.stack([in_channels(image, self.form.channels or image.shape[2]) for image in images])


# The function that opens each data set. Digits need scikit-learn, Fashion-MNIST may be downloaded, emoji need a font.
DATASETS: dict[str, Callable[[], Dataset]] = {
    "digits": open_digits,
    "fashion-mnist": open_fashion_mnist,
    "fashion-mnist-test": lambda: open_fashion_mnist("t10k"),
    "emoji": open_emoji,
}
