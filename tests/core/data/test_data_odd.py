"""Data as people have them: read with nothing lost, or with what is lost counted and named, or refused in one line."""

import io
import json
import os
import pickle
import re
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builders.data_sets import all_images, arrays_dataset, grey_zip, npy, png, zip_of
from uni_instruct.data import check_data, open_dataset, write_zip
from uni_instruct.data.image_files import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES
from uni_instruct.errors import FileFormatError, RequestError

Cli = Callable[..., tuple[int, str, str]]
Make = Callable[[Path], Path | str]
GREY, GREY2, COLOUR = (png(np.full(shape, level, np.uint8)) for shape, level in (((4, 4), 7), ((4, 4), 9), ((4, 4, 3), 8)))
WIDE = png(np.zeros((4, 8), np.uint8))
ACCENT = "é"  # written apart below, as macOS does
APART = unicodedata.normalize("NFD", ACCENT)


def folder(**files: bytes) -> Make:
    """Files by name in one folder; '__' is a slash."""

    def make(tmp: Path) -> Path:
        return folder_of(tmp / "x", {name.replace("__", "/"): content for name, content in files.items()})

    return make


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def files(names: dict[str, bytes], *, zipped: bool, meta: object = None) -> Make:
    def make(tmp: Path) -> Path:
        if zipped:
            return zip_of(tmp / "x.zip", names, meta)
        folder_of(tmp / "x", names)
        if meta is not None:
            (tmp / "x" / "dataset.json").write_text(json.dumps(meta))
        return tmp / "x"

    return make


def both(names: dict[str, bytes], meta: object = None) -> list[Make]:
    """The same files in a folder and in a zip."""
    return [files(names, zipped=zipped, meta=meta) for zipped in (False, True)]


def linked(links: dict[str, str], names: dict[str, bytes]) -> Make:
    def make(tmp: Path) -> Path:
        path = folder_of(tmp / "x", names)
        for name, target in links.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(target, path / name)
        return path

    return make


def encoded(form: str, suffix: str, mode: str = "RGB") -> dict[str, bytes]:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), 8, np.uint8)).convert(mode).save(buffer, form)
    return {f"a{suffix}": buffer.getvalue(), "b.png": COLOUR}


def named_zip(names: list[str]) -> Make:
    """A zip whose entries have exactly these names, also where one stands twice."""

    def make(tmp: Path) -> Path:
        with zipfile.ZipFile(tmp / "x.zip", "w") as archive:
            for level, name in enumerate(names):
                archive.writestr(zipfile.ZipInfo(name), png(np.full((4, 4), level, np.uint8)))
        return tmp / "x.zip"

    return make


def npz_labels(*labels: int) -> Make:
    def make(tmp: Path) -> Path:
        np.savez(tmp / "x.npz", arr_0=np.zeros((len(labels), 4, 4, 1), np.uint8), labels=np.array(labels))
        return tmp / "x.npz"

    return make


def renamed(make: Make, name: str) -> Make:
    return lambda tmp: Path(make(tmp)).rename(tmp / name)


CATS = {"cat/1.png": GREY, "cat/2.png": GREY2, "dog/3.png": GREY}
SHARDS = {"00000/img00000000.png": GREY, "00000/img00000001.png": GREY2, "00001/img00001000.png": GREY}
FFHQ = {"00000/00000.png": GREY, "00000/00007.png": GREY2, "01000/01003.png": GREY}
LABELS = {"labels": [["1.png", 0], ["2.png", 1]], "class_names": ["cat", "dog"]}
LABELLED = {"data/1.png": GREY, "data/2.png": GREY2}
META_BELOW = {"data/dataset.json": json.dumps(LABELS).encode()}
DROPPINGS = {
    "__MACOSX/cat/._1.png": b"\0\5\x16\7",
    "@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg": COLOUR,
    ".ipynb_checkpoints/1-checkpoint.png": GREY,
    "cat/.ipynb_checkpoints/1-checkpoint.png": GREY,
    "cat/Thumbs.db": b"x",
    "cat/.DS_Store": b"x",
    "dog/._3.png": b"\0\5\x16\7",
    "desktop.ini": b"x",
}
BOTH = ("cat", "dog")

# What it is, how it is made (once for a folder and once for a zip where both are meant), images, classes, what the note says.
READ: list[tuple[str, Make | list[Make], int, tuple[str, ...], str]] = [
    ("class folders", both(CATS), 3, BOTH, ""),
    ("class folders in a folder", both({f"pets/{name}": content for name, content in CATS.items()}), 3, BOTH, ""),
    ("class folders two down", both({f"a/b/{name}": content for name, content in CATS.items()}), 3, BOTH, ""),
    ("droppings", both({**CATS, **DROPPINGS}), 3, BOTH, ""),
    ("text beside", both({**CATS, "README.md": b"x", "labels.csv": b"x"}), 3, BOTH,
     r"2 files \(README.md, labels.csv\) skipped"),
    ("films beside", both({**CATS, "cat/a.mp4": b"x"}), 3, BOTH, r"1 file \(cat/a.mp4\) skipped: not images"),
    ("hidden image", both({**CATS, "cat/.h.png": GREY}), 3, BOTH, r"1 file \(cat/.h.png\) skipped"),
    ("no suffix", both({"a/1": GREY, "b/2.jpg_large": GREY2, "b/3": b"text"}), 2, ("a", "b"), r"1 file \(b/3\) skipped"),
    ("EDM's shards", both(SHARDS), 3, (), "folders are numbered with their images: read without classes"),
    ("FFHQ's shards", both(FFHQ), 3, (), "folders are numbered with their images: read without classes"),
    ("loose in a zip", files({"1.png": GREY, "cat/2.png": GREY}, zipped=True), 2, (), r"beside them \(1.png\): read without"),
    ("one folder in a zip", files({"pics/1.png": GREY, "pics/2.png": GREY2}, zipped=True), 2, (), ""),
    ("one class on disk", folder(cat__1_png=b"", **{"cat__1.png": GREY}), 1, ("cat",), r"1 file \(cat/1_png\) skipped"),
    ("one part alone", both({"train/cat/1.png": GREY, "train/dog/2.png": GREY}), 2, BOTH, ""),
    ("labels one down", both({**LABELLED, **META_BELOW}), 2, BOTH, ""),
    ("labels named from the top", both(LABELLED, {**LABELS, "labels": [["data/1.png", 0], ["./data/2.png", 1]]}), 2, BOTH, ""),
    ("labels with backslashes", both(LABELLED, {**LABELS, "labels": [["data\\1.png", 0], ["data\\2.png", 1]]}), 2, BOTH, ""),
    ("labels of something else", both(CATS, {"images": [], "annotations": []}), 3, BOTH,
     "dataset.json says nothing about labels"),
    ("labels null", both(CATS, {"labels": None}), 3, (), ""),
    ("labels from 1", both({"1.png": GREY, "2.png": GREY}, {"labels": [["1.png", 1], ["2.png", 2]]}), 2, ("0", "1", "2"),
     "at 1: class 0 has no image"),
    ("npz from 1", npz_labels(1, 2), 2, ("0", "1", "2"), "labels begin at 1: class 0 has no image"),
    ("npz from 3", npz_labels(3, 3), 2, ("0", "1", "2", "3"), "labels begin at 3: classes 0 to 2 have no image"),
    ("npz by content", renamed(npz_labels(0, 1), "samples.dat"), 2, ("0", "1"), ""),
    ("zip by content", renamed(files(CATS, zipped=True), "pets.bin"), 3, BOTH, ""),
    ("zip called npz", renamed(files(CATS, zipped=True), "pets.npz"), 3, BOTH, ""),
    ("a name twice", named_zip(["a.png", "b.png", "a.png"]), 2, (), r"1 name \(a.png\) skipped: already present"),
    ("backslashes", named_zip(["cat\\1.png", "dog\\2.png"]), 2, BOTH, ""),
    ("dots before names", named_zip(["./cat/1.png", "./dog/2.png"]), 2, BOTH, ""),
    ("accents apart", both({f"caf{APART}/1.png": GREY, "dog/2.png": GREY}), 2, (f"caf{ACCENT}", "dog"), ""),
    ("accents apart in labels", both({f"{ACCENT}.png": GREY}, {"labels": [[f"{APART}.png", 0]]}), 1, ("0",), ""),
    ("accents in both forms", both({f"{ACCENT}/1.png": GREY, f"{APART}/2.png": GREY, "z/3.png": GREY}), 3, ("z", ACCENT), ""),
    ("link to the parent", linked({"cat/up": ".."}, CATS), 3, BOTH, r"1 name \(cat/up/\) skipped: already present"),
    ("link to the folder above", linked({"cat/up": "../.."}, CATS), 3, BOTH, r"1 name \(cat/up/\)"),
    ("link to itself", linked({"cat/self": "."}, CATS), 3, BOTH, r"1 name \(cat/self/\)"),
    ("link to a class", linked({"ape": "cat"}, CATS), 3, BOTH, r"1 name \(ape/\) skipped"),
    ("link to a file", linked({"cat/0.png": "1.png"}, CATS), 3, BOTH, r"1 name \(cat/0.png\) skipped"),
    *((f"{form} {mode}", both(encoded(form, suffix, mode)), 2, (), "") for form, suffix, mode in [
        ("JPEG", ".jfif", "RGB"), ("JPEG", ".jpe", "L"), ("PPM", ".ppm", "RGB"), ("PPM", ".pgm", "L"), ("PPM", ".pnm", "RGB"),
        ("TGA", ".tga", "RGB"), ("PCX", ".pcx", "L"), ("SGI", ".rgb", "RGB"), ("GIF", ".gif", "P"), ("TIFF", ".TIF", "CMYK"),
        ("DIB", ".dib", "RGB"), ("JPEG2000", ".jp2", "RGB"), ("WEBP", ".webp", "RGB"), ("IM", ".im", "L"),
        ("DDS", ".dds", "RGB"),
    ]),
    *((f"grey at {at}", both({f"{i}.png": GREY if i == at else COLOUR for i in range(3)}), 3, (), "") for at in range(3)),
    ("colour among grey", both({"0.png": GREY, "1.png": GREY, "2.png": COLOUR}), 3, (), ""),
    ("latents and a note", both({"a.npy": npy(np.ones((8, 2, 2), np.float32)), "b.txt": b"x"}), 1, (),
     "skipped: not latents"),
]  # fmt: skip
CASES = [
    pytest.param(make, *case[2:], id=f"{case[0]}, {'zip' if at else 'folder'}" if isinstance(case[1], list) else case[0])
    for case in READ
    for at, make in enumerate(case[1] if isinstance(case[1], list) else [case[1]])
]


@pytest.mark.parametrize(("make", "images", "classes", "note"), CASES)
def test_nothing_is_lost_in_silence(tmp_path: Path, make: Make, images: int, classes: tuple[str, ...], note: str) -> None:
    path = make(tmp_path)
    dataset = open_dataset(path)
    assert (len(dataset), dataset.class_names) == (images, classes)
    assert re.search(note, dataset.note) if note else not dataset.note
    stored = dataset.stored(range(len(dataset)))
    assert len(stored) == images
    assert check_data(str(path)).wrong == ()
    assert check_data(str(path)).note == dataset.note


# What it is, how it is made, and the line.
REFUSED: list[tuple[str, Make | list[Make], str]] = [
    ("train and test", both({"train/1.png": GREY, "test/2.png": GREY}),
     r"has folders test, train, which are parts of a data set, not"),
    ("splits of classes", both({f"{part}/{name}": GREY for part in ("train", "val") for name in CATS}), "folders train, val"),
    ("splits one down", both({"x/Train/1.png": GREY, "x/Test/2.png": GREY}), "Test, Train, which are parts of a data set"),
    ("words as labels", both({"1.png": GREY}, {"labels": [["1.png", "cat"]]}),
     r'label cat, .*: an integer from 0; use numbers from 0 .*"class_names": \["cat"\]'),
    ("two sets", both({"a/1.png": GREY, "b/2.png": GREY, "a/dataset.json": b"{}", "b/dataset.json": b"{}"}),
     "several data sets \\(a, b"),
    ("only droppings", both({"__MACOSX/1.png": GREY, ".hidden/2.png": GREY}), "has no images; "),
    ("no images but", both({"a.mp4": b"x", "b.pdf": b"x"}), r"has no images but 2 files \(a.mp4, b.pdf\)"),
    ("HEIC alone", both({"a.heic": b"\0\0\0\x18ftypheic"}), r"has no images but 1 file \(a.heic\); save HEIC as"),
    ("loose on disk", files({"1.png": GREY, "cat/2.png": GREY}, zipped=False),
     r"both in class folders and beside them \(1.png\)"),
    ("empty class", files({"cat/1.png": GREY, "dog/a.heic": b"x"}, zipped=False), "class folder dog in .* has no images"),
    ("link to nothing", linked({"cat/9.png": "gone.png"}, CATS), r"cat/9\.png in .* cannot be read"),
    ("sizes", both({"1.png": GREY, "2.png": WIDE}), r"2\.png in .* is 8x4 grey, other images are 4x4 grey; .*--resolution"),
    ("a cut picture", both({"1.png": GREY, "2.png": GREY[:30]}), r"2\.png in .* cannot be read"),
    ("text called png", both({"1.png": GREY, "2.png": b"hello"}), r"2\.png in .* cannot be read: not an image"),
    ("an empty file", both({"1.png": GREY, "2.png": b""}), r"2\.png in .* cannot be read"),
    ("one picture", lambda tmp: folder_of(tmp, {"a.png": GREY}) / "a.png", r"is not a data set but an image, whose folder is"),
    ("an empty zip", lambda tmp: zip_of(tmp / "x.zip", {}), "has no images"),
    ("an empty file called zip", lambda tmp: folder_of(tmp, {"x.zip": b""}) / "x.zip", "is not a whole zip"),
    ("an empty file called npz", lambda tmp: folder_of(tmp, {"x.npz": b""}) / "x.npz", r"is not a whole \.npz"),
    ("a checkpoint", lambda tmp: folder_of(tmp, {"x.bin": pickle.dumps({"a": 1}, 2)}) / "x.bin",
     "not a data set but a pickle, which"),
    ("a compressed tar", lambda tmp: tar_of(tmp / "x.tar.gz", {"a/1.png": GREY}, "w:gz"),
     "is not a data set but a tar archive, which must be unpacked first"),
    ("a tar without images", lambda tmp: tar_of(tmp / "x.tar", {"a/1.txt": b"1"}),
     r"has no images but 1 file \(a/1.txt\); give tars of images"),
    ("one IDX file", lambda tmp: folder_of(tmp, {"x": b"\0\0\x08\x01\0\0\0\0"}) / "x",
     "but an IDX file, whose folder is the data"),
    ("CIFAR-10 cut", lambda tmp: folder_of(tmp / "x", {"batches.meta": b"\x80\x02", "data_batch_1": b""}),
     "batches.meta in .*x"),
]  # fmt: skip
REFUSALS = [
    pytest.param(make, case[2], id=f"{case[0]}, {'zip' if at else 'folder'}" if isinstance(case[1], list) else case[0])
    for case in REFUSED
    for at, make in enumerate(case[1] if isinstance(case[1], list) else [case[1]])
]


def tar_of(path: Path, contents: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def read_all(path: Path | str) -> None:
    dataset = open_dataset(path)
    dataset.stored(range(len(dataset)))


@pytest.mark.parametrize(("make", "line"), REFUSALS)
def test_what_cannot_be_meant_is_refused_in_one_line(tmp_path: Path, make: Make, line: str) -> None:
    path = make(tmp_path)
    with pytest.raises(RequestError, match=line) as error:
        read_all(path)
    assert (error.value.exit_code, "\n" in str(error.value)) == (2, False)


def test_the_cases_are_sixty_and_more() -> None:
    assert len(CASES) + len(REFUSALS) >= 60


@pytest.mark.parametrize("at", range(3))
def test_grey_among_colour_becomes_colour_wherever_it_stands(tmp_path: Path, at: int) -> None:
    names = {f"{i}.png": GREY if i == at else COLOUR for i in range(3)}
    for path in (folder_of(tmp_path / "f", names), zip_of(tmp_path / "x.zip", names)):
        pixels = all_images(open_dataset(path))
        assert pixels[:, 0, 0].tolist() == [[7] * 3 if i == at else [8] * 3 for i in range(3)]


def test_channels_bring_all_to_grey_or_colour(tmp_path: Path, cli: Cli) -> None:
    red = png(np.array([[[255, 0, 0]]], np.uint8).repeat(4, 0).repeat(4, 1))
    path = zip_of(tmp_path / "x.zip", {"0.png": red, "1.png": GREY})
    luma = round(0.299 * 255)  # ITU-R BT.601
    assert all_images(open_dataset(path, channels=1))[:, 0, 0, 0].tolist() == [luma, 7]
    assert all_images(open_dataset("digits", channels=3)).shape == (1797, 8, 8, 3)
    code, output, _ = cli("data", "prepare", path, "--channels", "1", "--out", tmp_path / "grey.zip")
    assert (code, "2 grey images of 4x4" in output) == (0, True)
    assert cli("data", "check", path, "--channels", "1")[0] == 0
    code, _, errors = cli("data", "prepare", path, "--channels", "2", "--out", tmp_path / "two.zip")
    assert (code, "channels 2 is neither 1 nor 3; give 1 for grey or 3 for colour" in errors) == (2, True)


def test_the_remedy_for_a_stray_colour_image_works(tmp_path: Path) -> None:
    """A zip that says that it is grey, with one image of colour: refused with --channels, which then reads it."""
    path = zip_of(tmp_path / "x.zip", {"0.png": GREY, "1.png": COLOUR}, {"labels": None, "image_shape": [1, 4, 4]})
    with pytest.raises(FileFormatError, match=r"1\.png in .* is 4x4 colour, .* 4x4 grey; .*data prepare --channels'"):
        all_images(open_dataset(path))
    assert all_images(open_dataset(path, channels=3)).shape == (2, 4, 4, 3)


def test_images_of_two_forms_are_joined_by_the_options_that_the_error_names(tmp_path: Path) -> None:
    grey, colour = grey_zip(tmp_path / "a.zip", (1,)), zip_of(tmp_path / "b.zip", {"0.png": png(np.zeros((8, 8, 3), np.uint8))})
    with pytest.raises(FileFormatError, match=r"data prepare --resolution --channels"):
        open_dataset(f"{grey},{colour}")
    assert open_dataset(f"{grey},{colour}", resolution=4, channels=3).image_shape == (3, 4, 4)


def test_every_suffix_of_pillow_is_read_or_has_a_reason() -> None:
    Image.init()
    opened = {suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN}
    assert opened - IMAGE_SUFFIXES - UNSUPPORTED_SUFFIXES == set()
    assert not IMAGE_SUFFIXES & UNSUPPORTED_SUFFIXES


def test_a_photo_beyond_pillows_limit_is_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    path = folder_of(tmp_path / "x", {"a.png": png(np.full((8, 8), 9, np.uint8))})  # more than the limit, less than twice
    with pytest.raises(FileFormatError, match="it is too large; resize it with --resolution"):
        open_dataset(path)
    assert all_images(open_dataset(path, resolution=4))[0, :, :, 0].tolist() == [[9] * 4] * 4
    assert check_data(str(path), resolution=4).wrong == ()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(FileFormatError, match=r"a\.png in .* cannot be read: Image size \(64 pixels\) exceeds limit"):
        open_dataset(path, resolution=4)


def test_a_prepared_zip_is_opened_without_looking_for_colour(tmp_path: Path) -> None:
    write_zip(arrays_dataset(np.zeros((3, 4, 4, 1), np.uint8), None), tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["image_shape"] == [1, 4, 4]
    assert open_dataset(tmp_path / "x.zip").image_shape == (1, 4, 4)


def python2_pickle(values: dict[str, object]) -> bytes:
    """A dict as Python 2 writes it: strings by SHORT_BINSTRING and BINSTRING, arrays by NumPy 1's reduction."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + len(value).to_bytes(4, "little") + value

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    def value_of(value: object) -> bytes:
        if isinstance(value, str):
            return text(value.encode())
        if isinstance(value, list):
            return b"](" + b"".join(map(value_of, value)) + b"e"
        if isinstance(value, int):
            return number(value)
        assert isinstance(value, np.ndarray)
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + number(-1) * 2 + b"K\x00tb"
        return (
            made
            + b"(K\x01"
            + number(value.shape[0])
            + number(value.shape[1])
            + b"\x86"
            + kind
            + b"\x89"
            + text(value.tobytes())
            + b"tb"
        )

    return b"\x80\x02}(" + b"".join(text(key.encode()) + value_of(value) for key, value in values.items()) + b"u."


@pytest.mark.parametrize("writer", ["Python 2", "Python 3"])
def test_cifar10s_own_archive_is_a_source(tmp_path: Path, writer: str, cli: Cli) -> None:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (10, 3, 32, 32), dtype=np.uint8), [n % 3 for n in range(10)]
    write = (
        python2_pickle if writer == "Python 2" else lambda values: pickle.dumps({k.encode(): v for k, v in values.items()}, 2)
    )
    contents = {"cifar-10-batches-py/batches.meta": write({"label_names": ["plane", "car", "bird"]})}
    for at in range(5):
        part = slice(2 * at, 2 * at + 2)
        values = {"batch_label": "b", "data": pixels[part].reshape(2, -1), "labels": labels[part]}
        contents[f"cifar-10-batches-py/data_batch_{at + 1}"] = write(values)
    archive = tar_of(tmp_path / "cifar-10-python.tar.gz", contents, "w:gz")
    for source in (archive, folder_of(tmp_path / "x", contents) / "cifar-10-batches-py"):
        dataset = open_dataset(source)
        assert dataset.labels is not None
        assert (dataset.class_names, dataset.labels.tolist()) == (("plane", "car", "bird"), labels)
        assert np.array_equal(all_images(dataset), pixels.transpose(0, 2, 3, 1))
    code, output, _ = cli("data", "prepare", archive, "--out", tmp_path / "c.zip")
    assert (code, "10 colour images of 32x32, 3 classes" in output) == (0, True)
    del contents["cifar-10-batches-py/data_batch_5"]
    with pytest.raises(FileFormatError, match=r"has no data_batch_5; download cifar-10-python\.tar\.gz again"):
        open_dataset(tar_of(tmp_path / "cut.tar", contents))


@pytest.mark.parametrize(
    "command",
    [
        ["data", "prepare", "digits", "--out", "/proc/x/d.zip"],
        ["data", "prepare", "digits", "--out", "/proc/d.zip"],
        ["generate", "digits", "--seeds", "0", "--out", "/proc/x"],
        ["generate", "digits", "--seeds", "0", "--out", "/proc/x/y.npz"],
    ],
)
def test_a_place_where_nothing_can_be_written_is_one_line(cli: Cli, command: list[str]) -> None:
    code, _, errors = cli(*command)
    assert code == 2
    assert "error: cannot write /proc/" in errors.splitlines()[-1]
