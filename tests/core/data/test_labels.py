"""What a `dataset.json` may say; a name or a label that fits nothing is said with what it may be meant for."""

import json
from pathlib import Path

import numpy as np
import pytest

from builders.data_sets import png, zip_of
from uni_instruct.data import check_data, open_dataset
from uni_instruct.errors import FileFormatError

ONE, TWO = (png(np.full((4, 4), level, np.uint8)) for level in (1, 2))
PAIR = {"a.png": ONE, "b.png": TWO}
LABELS = [["a.png", 1], ["b.png", 0]]


def data(path: Path, meta: object, images: dict[str, bytes] = PAIR, at: str = "dataset.json") -> Path:
    """A zip; meta is the text of `dataset.json`, or its content."""
    return zip_of(path / "x.zip", {**images, at: meta.encode() if isinstance(meta, str) else json.dumps(meta).encode()})


@pytest.mark.parametrize(
    "names", [["cat", "dog"], {"0": "cat", "1": "dog"}, {"1": "dog", "0": "cat"}, {"cat": 0, "dog": 1}, {"dog": 1, "cat": 0}]
)
def test_class_names_are_read_in_the_forms_that_people_write(tmp_path: Path, names: object) -> None:
    dataset = open_dataset(data(tmp_path, {"labels": LABELS, "class_names": names}))
    assert (dataset.class_names, dataset.note) == (("cat", "dog"), "")


@pytest.mark.parametrize(
    "names",
    ["cat", 5, [None, None], [["cat"], ["dog"]], {"1": "cat", "2": "dog"}, {"cat": 1, "dog": 2}, {"a.png": "cat"}, {"x": []}],
)
def test_class_names_that_are_none_are_left_out_and_said_to_be(tmp_path: Path, names: object) -> None:
    dataset = open_dataset(data(tmp_path, {"labels": LABELS, "class_names": names}))
    assert (dataset.class_names, dataset.note) == (("0", "1"), "class_names in dataset.json is not a list of names: ignored")


@pytest.mark.parametrize(
    ("meta", "key"),
    [
        ('{"labels": [["a.png", 0], ["b.png", 1]], "labels": [["a.png", 1], ["b.png", 0]]}', "labels"),
        ('{"labels": {"a.png": 0, "b.png": 1, "a.png": 1}}', "a.png"),
    ],
)
def test_a_key_with_two_values_is_refused(tmp_path: Path, meta: str, key: str) -> None:
    """As two labels of one image are in a list; json would take the last without a word."""
    line = rf"dataset\.json in .*x\.zip is not JSON: '{key}' occurs twice, with different values; "
    with pytest.raises(FileFormatError, match=line):
        open_dataset(data(tmp_path, meta))
    assert len(open_dataset(data(tmp_path, '{"labels": null, "labels": null}'))) == 2


NEAR = ["/data/x/a.png", "../x/a.png", "images/a.png", "A.PNG", "a", "a.jpg", "C:\\x\\a.png"]


@pytest.mark.parametrize("name", NEAR)
def test_a_label_that_may_be_meant_is_named_and_the_remedy_works(tmp_path: Path, name: str) -> None:
    path = data(tmp_path, {"labels": [[name, 0], ["b.png", 1]]})
    remedy = r"name the image a\.png in dataset\.json$"
    line = rf"a\.png in .* has no label in dataset\.json, which has one for .*; {remedy}"
    with pytest.raises(FileFormatError, match=line):
        open_dataset(path)
    assert "which has one for" in check_data(str(path)).wrong[0].problem
    assert open_dataset(data(tmp_path, {"labels": [["a.png", 0], ["b.png", 1]]})).num_classes == 2


@pytest.mark.parametrize("names", [("images/a.png", "images/b.png"), ("../images/a.png", "/images/b.png")])
def test_labels_beside_the_folder_of_images_are_seen_from_the_top(tmp_path: Path, names: tuple[str, str]) -> None:
    images = {f"images/{name}": content for name, content in PAIR.items()}
    meta = {"labels": [[name, number] for number, name in enumerate(names)]}
    dataset = open_dataset(data(tmp_path, meta, images, "annotations/dataset.json"))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1]


def test_values_are_shown_as_json_has_them(tmp_path: Path) -> None:
    for value, shown in ((None, "null"), (True, "true"), (0.5, "0.5"), (float("nan"), "NaN")):
        with pytest.raises(FileFormatError, match=f"has label {shown}, which is not a class"):
            open_dataset(data(tmp_path, {"labels": [["a.png", value], ["b.png", 1]]}))
