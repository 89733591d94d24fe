"""generate: one seed is one image in every form, and every form is read by those it is written for."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from builders.bundles import random_bundle
from uni_instruct.bundle import Bundle
from uni_instruct.data import open_dataset
from uni_instruct.engine import open_engine
from uni_instruct.errors import RequestError
from uni_instruct.generate import by_class, generate_batches, generate_images, resolve_class_ids
from uni_instruct.images import contact_sheet
from uni_instruct.noise import random_class_ids
from uni_instruct.spec import ModelSpec
from uni_instruct.system.files import sha256

Cli = Callable[..., tuple[int, str, str]]
FORMS = ("out", "out.npz", "out.zip")


class Echo:
    """An engine whose image is a hash of its noise and class, so that any mix-up shows."""

    name, device = "echo", "cpu"
    spec = ModelSpec(name="echo", noise_shape=(1, 2, 3), num_classes=5)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, noise: np.ndarray, class_ids: np.ndarray | None) -> np.ndarray:
        assert class_ids is not None
        assert (noise.dtype, class_ids.dtype) == (np.float32, np.int64)
        self.batches.append(len(noise))
        mixed = noise.view(np.uint32).astype(np.uint64) * 2654435761 + class_ids[:, None, None, None].astype(np.uint64)
        return (mixed >> 13).astype(np.uint8).transpose(0, 2, 3, 1)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20), st.integers(1, 25))
def test_an_image_depends_on_its_seed_and_class_alone(seeds: list[int], batch: int) -> None:
    engine = Echo()
    class_ids = resolve_class_ids(engine.spec, seeds)
    assert class_ids is not None
    images = generate_images(engine, seeds, class_ids, batch)
    assert images.shape == (len(seeds), 2, 3, 1)
    assert max(engine.batches) <= batch
    for index, seed in enumerate(seeds):
        alone = generate_images(engine, [seed], class_ids[index : index + 1])
        np.testing.assert_array_equal(images[index], alone[0])


def test_generation_streams() -> None:
    engine = Echo()
    parts = generate_batches(engine, range(10**6), np.zeros(10**6, np.int64), batch=4)
    assert len(next(parts)) == 4
    assert engine.batches == [4]


def test_no_seeds_give_no_images() -> None:
    assert generate_images(Echo(), [], np.zeros(0, np.int64)).shape == (0, 2, 3, 1)


def test_classes_are_the_user_s_or_the_seed_s(tiny_bundle: Bundle) -> None:
    spec = tiny_bundle.spec
    assert resolve_class_ids(spec, [4, 5, 6], ["3"]).tolist() == [3, 3, 3]  # type: ignore[union-attr]
    assert resolve_class_ids(spec, [4, 5], [1, "2"]).tolist() == [1, 2]
    np.testing.assert_array_equal(resolve_class_ids(spec, [4, 5, 6]), random_class_ids([4, 5, 6], 10))
    with pytest.raises(RequestError, match="2 classes were given for 3 seeds; give one class, or one for each seed"):
        resolve_class_ids(spec, [4, 5, 6], [1, 2])


def read_back(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    dataset = open_dataset(path)
    return dataset.images(range(len(dataset))), dataset.labels


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_images_and_classes(form: str, exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    seeds = [0, 1, 2, 5, 2**63 - 1]
    out = tmp_path / form
    code, output, _ = cli("generate", exported_bundle.path, "--seeds", f"0-2,5,{2**63 - 1}", "--out", out, "--json")
    assert code == 0
    assert json.loads(output)["images"] == 5
    engine = open_engine(exported_bundle)
    class_ids = resolve_class_ids(engine.spec, seeds)
    images, labels = read_back(out)
    np.testing.assert_array_equal(images, generate_images(engine, seeds, class_ids))
    np.testing.assert_array_equal(labels, class_ids)  # type: ignore[arg-type]
    assert sorted(os.listdir(tmp_path)) == [form]


def test_a_folder_names_images_by_seed(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    cli("generate", exported_bundle.path, "--seeds", "7,3,1000000", "--out", tmp_path / "few")
    names = ["0000003.png", "0000007.png", "1000000.png"]
    assert sorted(os.listdir(tmp_path / "few")) == [*names, "dataset.json", "samples.json"]
    record = json.loads((tmp_path / "few" / "samples.json").read_text())
    assert record["seeds"] == [7, 3, 1000000]
    labels = dict(json.loads((tmp_path / "few" / "dataset.json").read_text())["labels"])
    expected = dict(zip(names, random_class_ids([3, 7, 1000000], 10).tolist(), strict=True))
    assert labels == expected


def test_an_npz_is_what_the_field_reads(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    cli("generate", exported_bundle.path, "--seeds", "0-299", "--batch", "7", "--out", tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as data:
        assert (data["arr_0"].dtype, data["arr_0"].shape) == (np.uint8, (300, 8, 8, 1))
        assert (data["seeds"].dtype, data["seeds"].tolist()) == (np.int64, list(range(300)))
        np.testing.assert_array_equal(data["class_ids"], random_class_ids(range(300), 10))


def test_a_zip_is_edm_s(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    cli("generate", exported_bundle.path, "--seeds", "0-4", "--class", "3", "--out", tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        meta = json.loads(archive.read("dataset.json"))
        assert json.loads(archive.read("samples.json"))["seeds"] == [0, 1, 2, 3, 4]
        pictures = [name for name in archive.namelist() if name.endswith(".png")]
    assert pictures == [f"00000/img{index:08d}.png" for index in range(5)]
    assert meta["labels"] == [[name, 3] for name in pictures]
    assert meta["num_classes"] == 10


def test_data_prepare_reads_every_form(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    prints = set()
    for form in FORMS:
        cli("generate", exported_bundle.path, "--seeds", "0-9", "--out", tmp_path / form)
        assert cli("data", "prepare", tmp_path / form, "--out", tmp_path / f"{form}-prepared.zip")[0] == 0
        prints.add(open_dataset(tmp_path / f"{form}-prepared.zip").fingerprint())
    assert len(prints) == 1


def test_torch_fidelity_reads_a_folder(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    from uni_instruct.evaluate.fidelity import fidelity

    glob_samples_paths = fidelity("utils").glob_samples_paths
    images_dataset = fidelity("datasets").ImagesPathDataset
    cli("generate", exported_bundle.path, "--seeds", "0-9", "--out", tmp_path / "out")
    paths = glob_samples_paths(str(tmp_path / "out"), samples_find_deep=False, samples_find_ext="png,jpg", verbose=False)
    images = [images_dataset(paths)[index] for index in range(len(paths))]
    for image, expected in zip(images, read_back(tmp_path / "out")[0], strict=True):
        np.testing.assert_array_equal(image.numpy(), expected.transpose(2, 0, 1).repeat(3, axis=0))


def test_colour_without_classes(tmp_path: Path, cli: Cli) -> None:
    bundle = random_bundle(tmp_path / "colour", seed=4, num_classes=0, image_shape=(3, 12, 8))
    for form in FORMS:
        assert cli("generate", bundle.path, "--seeds", "0-3", "--out", tmp_path / form)[0] == 0
        images, labels = read_back(tmp_path / form)
        assert images.shape == (4, 12, 8, 3)
        assert labels is None
    with np.load(tmp_path / "out.npz") as data:
        assert "class_ids" not in data.files
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["labels"] is None


def test_the_grid_shows_the_images_in_the_order_of_the_seeds(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    arguments = ("generate", exported_bundle.path, "--seeds", "8,1,5,3", "--out", tmp_path / "out", "--grid")
    expected = contact_sheet(generate_images(open_engine(exported_bundle), [8, 1, 5, 3], random_class_ids([8, 1, 5, 3], 10)))
    # Of a new set, and of one that is there already.
    for name in ("first.png", "deep/second.png"):
        assert cli(*arguments, tmp_path / name)[0] == 0
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), expected[:, :, 0])


def test_by_class_is_a_row_of_the_grid_for_each_class(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    arguments = ("generate", exported_bundle.path, "--seeds", "40-69", "--by-class", "--grid", tmp_path / "grid.png")
    assert cli(*arguments)[0] == 0
    assert os.listdir(tmp_path) == ["grid.png"]
    class_ids = np.repeat(np.arange(10), 3)
    images = generate_images(open_engine(exported_bundle), range(40, 70), class_ids)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "grid.png")), contact_sheet(images, columns=3)[:, :, 0])
    assert cli(*arguments, "--out", tmp_path / "out.npz")[0] == 0
    with np.load(tmp_path / "out.npz") as data:
        np.testing.assert_array_equal(data["class_ids"], class_ids)
        np.testing.assert_array_equal(data["arr_0"], images)


def test_by_class_needs_classes(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="generator 'tiny' has no classes; leave --by-class out"):
        by_class(replace(Bundle.open("digits").spec, name="tiny", num_classes=0, class_names=()), range(10))


def test_engines_and_batches_give_the_same_set(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    for name, *options in (("a", "--batch", "3"), ("b", "--batch", "64"), ("c", "--engine", "torch")):
        assert cli("generate", exported_bundle.path, "--seeds", "0-19", "--out", tmp_path / name, *options)[0] == 0
    a, b, c = (read_back(tmp_path / name)[0].astype(int) for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() <= 1


def test_a_teacher_generates_too(tiny_teacher: Bundle, tmp_path: Path, cli: Cli) -> None:
    assert cli("generate", tiny_teacher.path, "--seeds", "0-1", "--out", tmp_path / "out.npz")[0] == 0
    assert read_back(tmp_path / "out.npz")[0].shape == (2, 8, 8, 1)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_command_again_changes_nothing(form: str, exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    command = ("generate", exported_bundle.path, "--seeds", "0-5", "--out", tmp_path / form)
    assert "written" in cli(*command)[1]
    before = snapshot(tmp_path)
    code, output, _ = cli(*command)
    assert code == 0
    assert "was complete" in output
    assert snapshot(tmp_path) == before
    for change, message in ((("--class", "2"), "other class_ids"), (("--batch", "5"), "batch 64 there, 5 here")):
        code, _, errors = cli(*command, *change)
        assert code == 2
        assert f"holds the images of another request ({message}); choose another --out or delete it" in errors
    assert snapshot(tmp_path) == before


def test_two_machines_write_the_same_bytes(exported_bundle: Bundle, tmp_path: Path, cli: Cli) -> None:
    moved = shutil.copytree(exported_bundle.path, tmp_path / "moved")
    for form in FORMS:
        cli("generate", exported_bundle.path, "--seeds", "0-5", "--out", tmp_path / "a" / form)
        cli("generate", moved, "--seeds", "0-5", "--out", tmp_path / "b" / form)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
