"""Labels of EDM's folders and zips, integers or vectors; several data sets as one; the number of classes stated."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from builders.data_sets import all_images, arrays_dataset, grey_zip, png, write_idx
from builders.machine import require_debian
from uni_instruct.data import open_dataset, write_zip
from uni_instruct.errors import RequestError

Cli = Callable[..., tuple[int, str, str]]
VECTORS = [[0.5, -1, 2], [0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(("one", "zero"), [(1, 0), (1.0, 0.0)])
def test_one_hot_vectors_are_classes(tmp_path: Path, one: float, zero: float) -> None:
    labels = [[zero, one, zero, zero], [one, zero, zero, zero], [zero, zero, one, zero]]
    dataset = open_dataset(grey_zip(tmp_path / "x.zip", (1, 2, 3), labels))
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.num_classes, dataset.note) == ([1, 0, 2], 4, "")


def test_other_vectors_are_read_without_classes_and_said_to_be(tmp_path: Path, cli: Cli) -> None:
    path = grey_zip(tmp_path / "x.zip", (1, 2, 3), VECTORS)
    dataset = open_dataset(path)
    assert (dataset.labels, dataset.num_classes) == (None, 0)
    assert all_images(dataset)[:, 0, 0, 0].tolist() == [1, 2, 3]
    note = "labels are vectors of 3 numbers and not one-hot: read without classes"
    assert f"note: {note}" in cli("inspect", path)[1]
    assert json.loads(cli("inspect", path, "--json")[1])["note"] == note
    with pytest.raises(RequestError, match=rf"data set 'x' has no classes \({note}\)"):
        open_dataset(path, num_classes=3)


def test_training_with_classes_on_other_vectors_says_why_not(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from uni_instruct.train.plan import plan_teacher
    from uni_instruct.train.recipe import load_recipe

    dataset = open_dataset(grey_zip(tmp_path / "x.zip", (1, 2, 3), VECTORS))
    with pytest.raises(RequestError, match=r"has no classes \(labels are vectors of 3 numbers.*\); --set network\.conditional"):
        plan_teacher(load_recipe("digits"), dataset)


def test_folders_of_edm_have_the_labels_of_their_json(tmp_path: Path) -> None:
    (tmp_path / "00000").mkdir()
    entries = []
    for number, label in enumerate(([0, 1], [1, 0], [0, 1])):
        name = f"00000/img{number:08d}.png"
        (tmp_path / name).write_bytes(png(np.full((4, 4, 3), number, np.uint8)))
        entries.append([name, label])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": entries}))
    dataset = open_dataset(tmp_path)
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.num_classes) == ([1, 0, 1], 2)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": None}))
    assert open_dataset(tmp_path).labels is None  # and the folder 00000 is no class


def test_npz_has_classes_under_any_of_its_names(tmp_path: Path) -> None:
    images = np.zeros((3, 4, 4, 1), np.uint8)
    for name in ("class_ids", "labels", "arr_1"):
        np.savez(tmp_path / "x.npz", arr_0=images, **{name: np.array([2, 0, 1], np.int32)})
        labels = open_dataset(tmp_path / "x.npz").labels
        assert labels is not None
        assert labels.tolist() == [2, 0, 1]
    np.savez(tmp_path / "x.npz", images, np.zeros((2, 5)))  # another array without a name is not of this data set
    assert open_dataset(tmp_path / "x.npz").labels is None


def test_several_sources_are_one_data_set_in_their_order(tmp_path: Path) -> None:
    """A zip, a folder and a zip; asked for in any order, images come in the order asked for."""
    first = grey_zip(tmp_path / "a.zip", (10, 11, 12), [0, 1, 2])
    last = grey_zip(tmp_path / "b.zip", (30,), [2], class_names=["x", "y", "z"], num_classes=3)
    for label in range(3):
        (tmp_path / "c" / str(label)).mkdir(parents=True)
        (tmp_path / "c" / str(label) / "i.png").write_bytes(png(np.full((4, 4), 20 + label, np.uint8)))
    dataset = open_dataset(f"{first}, {tmp_path / 'c'},{last}")
    assert dataset.labels is not None
    assert (len(dataset), dataset.name, dataset.class_names) == (7, "a+c+b", ("x", "y", "z"))
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2, 2]
    assert all_images(dataset)[:, 0, 0, 0].tolist() == [10, 11, 12, 20, 21, 22, 30]
    assert dataset.images([6, 0, 4, 4, -1])[:, 3, 3, 0].tolist() == [30, 10, 21, 21, 30]
    assert dataset.images([]).shape == (0, 4, 4, 1)


def test_a_source_whose_name_has_a_comma_stays_whole(tmp_path: Path) -> None:
    path = grey_zip(tmp_path / "a,b.zip", (1, 2))
    assert len(open_dataset(path)) == 2


def test_joined_parts_of_real_data_have_the_fingerprint_of_the_whole(tmp_path: Path) -> None:
    digits = open_dataset("digits")
    images, labels = all_images(digits), digits.labels
    assert labels is not None
    for name, part in (("a", slice(0, 700)), ("b", slice(700, None))):
        write_zip(arrays_dataset(images[part], labels[part], 10), tmp_path / f"{name}.zip")
    assert open_dataset(f"{tmp_path / 'a.zip'},{tmp_path / 'b.zip'}").fingerprint() == digits.fingerprint()


@pytest.mark.debian
def test_train_and_test_of_fashion_mnist_are_joined_by_name() -> None:
    require_debian("/usr/share/datasets/fashion-mnist", "dataset-fashion-mnist")
    both = open_dataset("fashion-mnist,fashion-mnist-test")
    assert (len(both), both.num_classes, both.class_names[9]) == (70000, 10, "ankle boot")
    assert np.array_equal(both.images([60000])[0], open_dataset("fashion-mnist-test").images([0])[0])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"levels": (1,), "labels": [0], "side": 8}, r"images of \[1, 4, 4\] and 2 classes, .*\[1, 8, 8\].*--resolution"),
        ({"levels": (1,), "labels": [0]}, r"2 classes, .* and 1 classes; if some lack .*, state the number .*--num-classes"),
        ({"levels": (1,)}, r"2 classes, .* and no classes"),
        (
            {"levels": (1, 2), "labels": [0, 1], "class_names": ["cat", "owl"], "num_classes": 2},
            r"a class is 'dog' in .*a\.zip and 'owl' in .*b\.zip",
        ),
    ],
)
def test_parts_that_do_not_fit_are_one_clear_line(tmp_path: Path, second: dict, message: str) -> None:
    names = {"class_names": ["cat", "dog"], "num_classes": 2}
    first, other = grey_zip(tmp_path / "a.zip", (1, 2), [0, 1], **names), grey_zip(tmp_path / "b.zip", **second)
    with pytest.raises(RequestError, match=message):
        open_dataset(f"{first},{other}")


def test_zips_that_lack_their_last_classes_are_prepared_as_one(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    grey_zip(Path("a.zip"), (1, 2), [0, 3])
    grey_zip(Path("b.zip"), (3, 4), [1, 0])
    code, _, errors = cli("data", "prepare", "a.zip,b.zip", "--out", "all.zip")
    assert (code, "--num-classes" in errors) == (2, True)
    code, output, _ = cli("data", "prepare", "a.zip,b.zip", "--num-classes", "5", "--out", "all.zip")
    assert (code, "4 grey images of 4x4, 5 classes" in output) == (0, True)
    whole = open_dataset("all.zip")
    assert whole.labels is not None
    assert (whole.labels.tolist(), whole.num_classes) == ([0, 3, 1, 0], 5)
    assert "classes: 5" in cli("inspect", "all.zip,all.zip")[1]
    for number, message in (
        ("2", "has labels in 0..3; use 0..1"),
        ("0", "Invalid value for '--num-classes': 0 is not in the range 1<=x<=1000000."),
    ):
        code, _, errors = cli("data", "prepare", "a.zip", "--num-classes", number, "--out", "few.zip")
        assert (code, message in errors) == (2, True)


def test_a_part_that_is_not_there_is_named(tmp_path: Path, cli: Cli) -> None:
    path = grey_zip(tmp_path / "a.zip", (1,))
    for command in (["inspect"], ["data", "check"]):
        code, _, errors = cli(*command, f"{path},{tmp_path / 'b.zip'}")
        assert (code, f"there is no data set {tmp_path / 'b.zip'}" in errors) == (2, True)


def test_training_reads_several_zips_by_a_recipes_data(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from uni_instruct.train.plan import make_plan
    from uni_instruct.train.recipe import load_recipe

    write_idx(tmp_path, np.zeros((4, 8, 8), np.uint8), np.arange(4, dtype=np.uint8))
    write_zip(open_dataset(tmp_path), tmp_path / "a.zip")
    plan = make_plan(load_recipe("digits", [f"data={tmp_path / 'a.zip'},{tmp_path / 'a.zip'}", "trackers=[]"]))
    assert plan.dataset is not None
    assert (len(plan.dataset), plan.teacher_spec.num_classes) == (8, 4)
