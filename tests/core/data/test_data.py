"""Data sets in and out: what is written is what is read, by this package and by EDM's rules."""

import gzip
import http.server
import io
import json
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from builders.data_sets import all_images, arrays_dataset, png, write_idx
from builders.machine import require_debian
from uni_instruct.data import fashion_mnist, open_dataset, write_zip
from uni_instruct.errors import FileFormatError, RequestError

RNG = np.random.default_rng(7)
FASHION = "/usr/share/datasets/fashion-mnist"


def read_as_edm(path: Path) -> tuple[np.ndarray, list[int]]:
    """Pixels and labels by the rules of EDM's loader: names sorted, decoded by Pillow, labels looked up by name."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        labels = dict(json.loads(archive.read("dataset.json"))["labels"])
        pixels = [np.array(Image.open(io.BytesIO(archive.read(name)))) for name in names]
    return np.stack(pixels), [labels[name] for name in names]


def test_digits_are_scikit_learns_with_their_levels_spread() -> None:
    from sklearn.datasets import load_digits

    digits, truth = open_dataset("digits"), load_digits()
    assert (len(digits), digits.image_shape, digits.num_classes) == (1797, (1, 8, 8), 10)
    assert digits.labels is not None
    assert np.array_equal(digits.labels, truth.target)
    pixels = all_images(digits)[:, :, :, 0]
    assert (pixels.min(), pixels.max(), len(np.unique(pixels))) == (0, 255, 17)
    assert np.abs(pixels / 255 * 16 - truth.images).max() < 0.04


def test_zip_follows_edms_format_and_loses_nothing(tmp_path: Path) -> None:
    digits, path = open_dataset("digits"), tmp_path / "digits.zip"
    write_zip(digits, path)
    pixels, labels = read_as_edm(path)
    assert np.array_equal(pixels, all_images(digits)[:, :, :, 0])
    assert digits.labels is not None
    assert labels == digits.labels.tolist()
    with zipfile.ZipFile(path) as archive:
        entries, meta = archive.infolist(), json.loads(archive.read("dataset.json"))
    assert {entry.compress_type for entry in entries} == {zipfile.ZIP_STORED}
    assert [entries[0].filename, entries[1796].filename] == ["00000/img00000000.png", "00001/img00001796.png"]
    assert (meta["num_classes"], meta["class_names"], meta["licence"]) == (10, list("0123456789"), "CC-BY-4.0")

    again = open_dataset(path)
    assert again.fingerprint() == digits.fingerprint()
    assert (again.name, again.licence, again.class_names) == (digits.name, digits.licence, digits.class_names)
    write_zip(again, tmp_path / "second.zip")
    assert all_images(open_dataset(tmp_path / "second.zip")).tobytes() == all_images(digits).tobytes()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    num_classes=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_any_data_set_survives_its_zip(
    tmp_path: Path, count: int, height: int, width: int, channels: int, num_classes: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
    labels = rng.integers(0, num_classes, count) if num_classes else None
    dataset = arrays_dataset(images, labels, num_classes)
    write_zip(dataset, tmp_path / "data.zip")
    again = open_dataset(tmp_path / "data.zip")
    assert np.array_equal(all_images(again), images)
    assert (again.image_shape, again.num_classes) == (dataset.image_shape, num_classes)
    assert (again.labels is None) == (labels is None)
    assert again.fingerprint() == dataset.fingerprint()


def test_zip_of_a_subset_without_the_last_class_keeps_the_number_of_classes(tmp_path: Path) -> None:
    write_zip(arrays_dataset(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]), 5), tmp_path / "subset.zip")
    assert open_dataset(tmp_path / "subset.zip").num_classes == 5


def test_zips_of_other_tools_are_read(tmp_path: Path) -> None:
    """Deflated, without this package's additions to dataset.json, in any order; without dataset.json there are no classes."""
    images = RNG.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    for name, meta in (("classes", {"labels": [["b/2.png", 2], ["b/10.png", 0], ["a.png", 1]]}), ("bare", None)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file, image in zip(("b/10.png", "a.png", "b/2.png"), images, strict=True):
                archive.writestr(file, png(image))
            if meta:
                archive.writestr("dataset.json", json.dumps(meta))
    classes, bare = open_dataset(tmp_path / "classes.zip"), open_dataset(tmp_path / "bare.zip")
    assert classes.labels is not None
    assert classes.labels.tolist() == [1, 2, 0]
    assert np.array_equal(all_images(classes), images[[1, 2, 0]])
    assert (bare.labels, bare.num_classes, bare.name) == (None, 0, "bare")


def test_class_folders_become_classes_in_natural_order(tmp_path: Path) -> None:
    for folder, level in (("10", 10), ("9", 9), ("2", 2)):
        (tmp_path / folder / "more").mkdir(parents=True)
        (tmp_path / folder / "x.png").write_bytes(png(np.full((4, 4), level, np.uint8)))
        (tmp_path / folder / "more" / "y.png").write_bytes(png(np.full((4, 4), level + 100, np.uint8)))
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "z.png").write_bytes(b"not looked at")
    (tmp_path / "2" / "notes.txt").write_text("not an image")
    dataset = open_dataset(tmp_path)
    assert dataset.class_names == ("2", "9", "10")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert all_images(dataset)[:, 0, 0, 0].tolist() == [102, 2, 109, 9, 110, 10]


def test_folder_pictures_are_brought_to_one_form(tmp_path: Path) -> None:
    """Grey among colour becomes colour, transparency is dropped, palettes are resolved, and cameras' rotation is applied."""
    pixels = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    rotated = Image.fromarray(np.rot90(pixels).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    (tmp_path / "0.png").write_bytes(png(pixels[:, :, 0]))
    (tmp_path / "1.png").write_bytes(png(pixels))
    (tmp_path / "2.png").write_bytes(png(np.dstack([pixels, np.full((4, 6), 9, np.uint8)])))
    (tmp_path / "3.png").write_bytes(png(rotated, exif=exif))
    dataset = open_dataset(tmp_path)
    assert (dataset.image_shape, dataset.labels) == ((3, 4, 6), None)
    images = all_images(dataset)
    assert np.array_equal(images[0], np.repeat(pixels[:, :, :1], 3, axis=2))
    assert all(np.array_equal(image, pixels) for image in images[1:])


def test_resolution_crops_the_centre_and_resizes(tmp_path: Path) -> None:
    wide, tall = (RNG.integers(0, 256, shape, dtype=np.uint8) for shape in ((4, 8, 3), (9, 4, 3)))
    (tmp_path / "0.png").write_bytes(png(wide))
    (tmp_path / "1.png").write_bytes(png(tall))
    same = open_dataset(tmp_path, resolution=4)
    assert np.array_equal(same.images([0])[0], wide[:, 2:6])
    assert np.array_equal(same.images([1])[0], tall[2:6])
    assert open_dataset(tmp_path, resolution=2).images([1, 0]).shape == (2, 2, 2, 3)
    half = open_dataset("digits", resolution=4).images([5])[0, :, :, 0].astype(float)
    assert abs(half.mean() - open_dataset("digits").images([5]).mean()) < 12


def test_only_the_images_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """A data set with one broken file works until that file is asked for, and then names it."""
    path = tmp_path / "data.zip"
    write_zip(arrays_dataset(RNG.integers(0, 256, (3, 8, 8, 1), dtype=np.uint8), None), path)
    content = path.read_bytes()
    second = content.find(b"PNG", content.find(b"img00000001.png")) + 30
    path.write_bytes(content[:second] + b"\0\0\0\0\0\0\0\0" + content[second + 8 :])
    dataset = open_dataset(path)
    assert dataset.images([2, 0]).shape == (2, 8, 8, 1)
    with pytest.raises(FileFormatError, match=r"00000/img00000001\.png in .*data\.zip cannot be read"):
        dataset.images([1])


def test_npz_of_samples(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "plain.npz", arr_0=images)
    np.savez(tmp_path / "classes.npz", arr_0=images, class_ids=np.array([3, 0, 1, 1]), seeds=np.arange(4))
    plain, classes = open_dataset(tmp_path / "plain.npz"), open_dataset(tmp_path / "classes.npz")
    assert np.array_equal(all_images(plain), images)
    assert (plain.image_shape, plain.labels) == ((3, 5, 6), None)
    assert classes.labels is not None
    assert (classes.labels.tolist(), classes.num_classes) == ([3, 0, 1, 1], 4)


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_of_any_data_set(tmp_path: Path, compress: bool) -> None:
    images, labels = RNG.integers(0, 256, (5, 3, 4), dtype=np.uint8), np.array([2, 0, 1, 1, 2], np.uint8)
    write_idx(tmp_path, images, labels, compress)
    dataset = open_dataset(tmp_path)
    assert np.array_equal(all_images(dataset)[:, :, :, 0], images)
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.class_names, dataset.name) == (labels.tolist(), ("0", "1", "2"), tmp_path.name)


@pytest.mark.debian
def test_fashion_mnist_of_debian(tmp_path: Path) -> None:
    require_debian(FASHION, "dataset-fashion-mnist")
    train, test = open_dataset("fashion-mnist"), open_dataset("fashion-mnist-test")
    assert train.labels is not None
    assert (len(train), len(test), train.image_shape) == (60000, 10000, (1, 28, 28))
    assert train.class_names[train.labels[0]] == "ankle boot"
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert open_dataset(FASHION).name == "fashion-mnist"  # recognised by its labels

    few = arrays_dataset(train.images(range(50)), train.labels[:50], 10)
    write_zip(few, tmp_path / "few.zip")
    pixels, labels = read_as_edm(tmp_path / "few.zip")
    assert np.array_equal(pixels, train.images(range(50))[:, :, :, 0])
    assert labels == train.labels[:50].tolist()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder over HTTP on this machine."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def without_debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No Debian package and an empty cache, whose folder is returned."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "no-debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.debian
def test_fashion_mnist_is_downloaded_once_and_checked(without_debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(require_debian(FASHION, "dataset-fashion-mnist")) as url:
        monkeypatch.setattr(fashion_mnist, "URL", url)
        assert len(open_dataset("fashion-mnist-test")) == 10000
    assert len(open_dataset("fashion-mnist-test")) == 10000  # the server is gone
    assert len(list(without_debian.rglob("*.gz"))) == 2


def test_a_wrong_download_is_refused_and_not_kept(
    without_debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with served(tmp_path) as url:
        monkeypatch.setattr(fashion_mnist, "URL", url)
        with pytest.raises(RequestError, match=r"Fashion-MNIST from .* has a wrong checksum.*dataset-fashion-mnist"):
            open_dataset("fashion-mnist")
    assert not list(without_debian.rglob("*.gz"))


def test_fashion_mnist_offline_says_what_to_do(without_debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "URL", "http://127.0.0.1:9")
    with pytest.raises(
        RequestError, match=r"Fashion-MNIST cannot be downloaded \(.+\); install Debian's dataset-fashion-mnist"
    ):
        open_dataset("fashion-mnist")
