"""A newcomer's own small data: what scores them is chosen and said, and a start that was refused claims nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from uni_instruct.data import ArrayReader, Dataset
from uni_instruct.data.dataset import number_names
from uni_instruct.errors import RequestError
from uni_instruct.train.config import LoopConfig
from uni_instruct.train.scoring_choice import choose_scoring

Cli = Callable[..., tuple[int, str, str]]
SHORT = [
    "network.conditional=false",
    "network.model_channels=16",
    "precision=32-true",
    "channels_last=false",
    "teacher.batch=4",
    "teacher.duration_kimg=0.004",
    "teacher.steps=2",
    "distillation.batch=4",
    "distillation.duration_kimg=0.008",
    "critic_warmup_kimg=0",
    "loop.grid=4",
    "loop.report=false",
    "trackers=[]",
    "method=sid",
]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """40 small colour photographs without classes."""
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def data_of(count: int, classes: int, channels: int = 3, side: int = 32) -> Dataset:
    return Dataset(
        name="mine",
        image_shape=(channels, side, side),
        labels=np.arange(count) % classes if classes else None,
        num_classes=classes,
        class_names=number_names(classes),
        licence="unknown",
        source="mine",
        reader=ArrayReader(np.broadcast_to(np.zeros((1, side, side, channels), np.uint8), (count, side, side, channels))),
    )


def test_what_is_passed_over_is_said_before_anything_is_trained(
    photos: Path, tmp_path: Path, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever trains without having looked at the data first hears it too."""
    (photos / "metadata.jsonl").write_text("{}")
    (photos / "film.mp4").write_bytes(b"x")
    note = "2 files (film.mp4, metadata.jsonl) skipped: not images; classes are read from dataset.json or folders, not from"
    given = [f"data={photos}", *SHORT, "loop.metric=none"]
    for command in (["train", "digits", "--dry-run"], ["doctor", "digits"]):
        code, output, errors = cli(*command, *given)
        words = " ".join(output.replace("#", " ").split())  # a dry run breaks its lines
        assert (code, note in words) == (0, True), (command, output, errors)
    assert cli("train", "digits", "--out", tmp_path / "run", *given)[0] == 0
    assert caplog.messages[0].startswith(f"data set 'photos': {note}")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("dataset", "extractor", "words"),
    [
        (data_of(60, 2), "classifier", "as 60 images are fewer than InceptionV3's 2,048 features"),
        (data_of(5000, 2, channels=1), "classifier", "a classifier of 'mine' itself (loop.extractor=classifier)"),
        (data_of(5000, 10, side=8), "classifier", "a classifier of 'mine' itself"),
        (data_of(40, 0), "none", "40 images of 0 classes cannot be scored, so the last weights are kept"),
        (data_of(40, 2), "none", "so the last weights are kept (loop.metric=none): InceptionV3 weights cannot be downloaded"),
    ],
)
def test_small_data_have_a_judge_and_a_line_that_says_which(dataset: Dataset, extractor: str, words: str) -> None:
    choice = choose_scoring(LoopConfig(), dataset)
    assert ("none" if choice.loop.metric == "none" else choice.loop.extractor) == extractor
    assert words in choice.words
    assert choose_scoring(choice.loop, dataset).loop == choice.loop  # as a run that goes on


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("dataset", "loop", "remedy"),
    [
        (data_of(5000, 10), LoopConfig(), "or --set extractor=classifier"),
        (data_of(5000, 0), LoopConfig(), "or --set metric=none"),
        (data_of(40, 0), LoopConfig(extractor="inception"), "or --set metric=none"),
        (data_of(40, 2), LoopConfig(extractor="classifier"), "give 50 images of 2 classes or more, or --set metric=none"),
    ],
)
def test_what_is_asked_for_and_cannot_be_had_has_a_remedy_that_train_takes(
    dataset: Dataset, loop: LoopConfig, remedy: str
) -> None:
    with pytest.raises(RequestError) as refused:
        choose_scoring(loop, dataset)
    assert refused.value.remedy.endswith(remedy)
    setting = remedy.rpartition("--set ")[2]
    key, _, value = setting.partition("=")
    changed = LoopConfig(**{key: value})
    assert choose_scoring(changed, dataset).loop == changed


@pytest.mark.usefixtures("offline")
def test_a_refused_start_leaves_the_folder_to_the_next(cli: Cli, tmp_path: Path, photos: Path) -> None:
    run, given = tmp_path / "run", ["--set", f"data={photos}", *SHORT]
    code, out, _ = cli("doctor", "digits", "--json", *given[1:], "loop.extractor=inception")
    evaluation = next(finding for finding in json.loads(out) if finding["subject"] == "evaluation")
    assert (code, evaluation["ok"], "cannot be downloaded" in evaluation["words"]) == (2, False, True)
    code, _, errors = cli("train", "digits", "--out", run, *given, "loop.extractor=inception")
    assert (code, errors.count("\n"), "or --set metric=none" in errors) == (2, 1, True), errors
    code, _, errors = cli("train", "digits", "--out", run, *given, "metric=none", "distillation.duration_kimg=0.004")
    assert code == 0, errors
    assert (run / "generator" / "model.safetensors").is_file()


@pytest.mark.usefixtures("offline")
def test_forty_photographs_train_without_a_word_of_setting(
    cli: Cli, caplog: pytest.LogCaptureFixture, tmp_path: Path, photos: Path
) -> None:
    code, _, errors = cli("train", "digits", "--out", tmp_path / "run", "--set", f"data={photos}", *SHORT)
    assert code == 0, errors
    assert "40 images of 0 classes cannot be scored" in caplog.text
    assert (tmp_path / "run" / "generator" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["teacher", "generator", "report"])
def test_a_folder_of_somebodys_is_not_replaced_by_a_runs(cli: Cli, tmp_path: Path, photos: Path, name: str) -> None:
    """A report/ that stood in --out was gone when the training ended."""
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "thesis.tex").write_text("mine")
    given = ["--set", f"data={photos}", *SHORT, "metric=none"]
    said = f"{tmp_path}/out/{name} would be replaced, and no training made it; choose another --out"
    code, _, errors = cli("train", "digits", "--out", tmp_path / "out", *given)
    assert (code, errors.splitlines()[-1]) == (2, f"error: {said}")
    code, out, _ = cli("doctor", "digits", "--out", tmp_path / "out", "--json", *given[1:])
    assert (code, said in next(found["words"] for found in json.loads(out) if found["subject"] == "run")) == (2, True)
    assert [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.name != "run.lock"] == [
        name,
        f"{name}/thesis.tex",
    ]


def test_a_recipe_that_stands_alone_in_a_folder_is_replaced(cli: Cli, tmp_path: Path, photos: Path) -> None:
    """A killed start leaves no more than that."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: other\ndata: digits\nnetwork: {model_channels: 64}\n")
    code, _, errors = cli("train", "digits", "--out", run, "--set", f"data={photos}", *SHORT, "metric=none")
    assert code == 0, errors
    assert "model_channels: 16" in (run / "recipe.yaml").read_text()
