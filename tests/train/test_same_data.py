"""Data that change under a run are said to have changed, in one line, before anything is trained."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from builders.data_sets import arrays_dataset, png
from uni_instruct.data import open_dataset, write_zip
from uni_instruct.errors import RequestError
from uni_instruct.train.data_fingerprint import check_same_data
from uni_instruct.train.recipe_changes import DATA_DESCRIPTION


def photos(path: Path, *classes: str, images: int = 3) -> Path:
    for number, name in enumerate(classes):
        (path / name).mkdir(parents=True, exist_ok=True)
        for index in range(images):
            (path / name / f"{index}.png").write_bytes(png(np.full((4, 4), 16 * number + index, np.uint8)))
    return path


def begun(tmp_path: Path) -> tuple[Path, Path]:
    """A run's folder, and the data that it was begun with."""
    data = photos(tmp_path / "data", "cat", "dog")
    check_same_data(tmp_path / "run", open_dataset(data), write=True)
    (tmp_path / "run" / "log.jsonl").touch()
    return tmp_path / "run", data


def test_the_same_data_in_another_place_and_container_pass(tmp_path: Path) -> None:
    run, data = begun(tmp_path)
    before = (run / DATA_DESCRIPTION).read_bytes()
    write_zip(open_dataset(data), tmp_path / "data.zip")
    shutil.copytree(data, tmp_path / "copy")
    for source in (data, tmp_path / "copy", tmp_path / "data.zip"):
        check_same_data(run, open_dataset(source), write=True)
    assert (run / DATA_DESCRIPTION).read_bytes() == before


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda data: photos(data, "fox"), r"has other classes \(got fox\) since the run in .* was started; restore the data"),
        (lambda data: shutil.rmtree(data / "dog"), r"has other classes \(lost dog\)"),
        (lambda data: (data / "dog").rename(data / "fox"), r"has other classes \(got fox and lost dog\)"),
        (lambda data: photos(data, "dog", images=5), r"has changed from 6 images to 8 since the run"),
        (lambda data: (data / "dog" / "0.png").write_bytes(png(np.zeros((4, 4), np.uint8))), r"has other images or labels"),
        (lambda data: (data / "dog" / "0.png").rename(data / "cat" / "9.png"), r"has other images or labels"),
    ],
)
def test_other_data_are_said_to_be_others(tmp_path: Path, change: object, line: str) -> None:
    run, data = begun(tmp_path)
    change(data)  # type: ignore[operator]
    with pytest.raises(RequestError, match=line) as error:
        check_same_data(run, open_dataset(data), write=True)
    assert (error.value.exit_code, "\n" in str(error.value)) == (2, False)


def test_of_large_data_a_thousand_images_are_looked_at(tmp_path: Path) -> None:
    """Evenly spaced ones: the last of 5,000 images is not among them, the first is."""
    images = np.arange(5000, dtype=np.uint16).astype(np.uint8).reshape(-1, 1, 1, 1)
    first, last = images.copy(), images.copy()
    first[0], last[-1] = 99, 99
    prints = [arrays_dataset(values, None).sample_fingerprint() for values in (images, first, last)]
    assert prints[0] == prints[2] != prints[1]


def test_a_run_without_a_note_gets_one(tmp_path: Path) -> None:
    data = open_dataset(photos(tmp_path / "data", "cat", "dog"))
    check_same_data(tmp_path / "run", data, write=False)
    assert not (tmp_path / "run").exists()
    check_same_data(tmp_path / "run", data, write=True)
    assert json.loads((tmp_path / "run" / DATA_DESCRIPTION).read_text())["class_names"] == ["cat", "dog"]


def test_the_note_of_a_start_that_came_to_nothing_is_replaced(tmp_path: Path) -> None:
    run, data = begun(tmp_path)
    (run / "log.jsonl").unlink()
    check_same_data(run, open_dataset(photos(data, "fox")), write=True)
    assert json.loads((run / DATA_DESCRIPTION).read_text())["class_names"] == ["cat", "dog", "fox"]
