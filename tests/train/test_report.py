"""A run's report: its numbers are the log's, its pictures the bundles' images; links, commands and times hold."""

import base64
import dataclasses
import itertools
import json
import logging
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from builders.bundles import random_bundle
from builders.plans import TINY
from builders.runs import WITHOUT_DATA
from uni_instruct.bundle import Bundle
from uni_instruct.cli import cli as command_group
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.data.dataset import ArrayReader
from uni_instruct.engine import open_engine
from uni_instruct.evaluate import Evaluator
from uni_instruct.generate import generate_images, resolve_class_ids
from uni_instruct.images import contact_sheet, encode
from uni_instruct.networks.build import build_denoiser
from uni_instruct.train.monitoring import scores as selection
from uni_instruct.train.monitoring.clock import Clock, read_times
from uni_instruct.train.pipeline import train
from uni_instruct.train.recipe import load_recipe
from uni_instruct.train.report import page, scores
from uni_instruct.train.report import steps_section as steps
from uni_instruct.train.report.class_section import variety
from uni_instruct.train.report.markdown import duration, spread, text
from uni_instruct.train.report.neighbours import by_features, by_pixels, nearest
from uni_instruct.train.report.page import report_is_current, write_report
from uni_instruct.train.report.records import parse_history, read_history
from uni_instruct.train.report.scores import score_sets
from uni_instruct.train.run import Run

SHORT = (*TINY, "teacher.steps=4", "loop.samples=100", "loop.log_kimg=0.016", "distillation.evaluate_kimg=0.064")


@pytest.fixture(scope="module", autouse=True)
def _same_randomness_for_others() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="module", autouse=True)
def _few_step_counts() -> Iterator[None]:
    """How the teacher is scored does not depend on how often: the report's six take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "STEP_COUNTS", (2, 4))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the digits recipe in a folder whose name a shell would take apart. Read only."""
    out = tmp_path_factory.mktemp("runs") / "a run's"
    train(load_recipe("digits", SHORT), out)
    return out


def report_of(run: Path) -> str:
    return (run / "report.md").read_text()


def commands_of(report: str) -> list[list[str]]:
    block = re.search(r"^```sh\n(.*?)^```", report, flags=re.MULTILINE | re.DOTALL)
    assert block
    return [shlex.split(line) for line in block[1].splitlines() if not line.startswith("#")]


def table_row(report: str, name: str) -> list[str]:
    (line,) = [line for line in report.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def assert_links_hold(run: Path) -> list[str]:
    links = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", report_of(run))
    for link in links:
        Image.open(run / link).verify()
    assert sorted(link.removeprefix("report/") for link in links) == sorted(path.name for path in (run / "report").iterdir())
    return links


def test_every_picture_is_linked_and_can_be_read(finished: Path) -> None:
    names = [Path(link).name for link in assert_links_hold(finished)]
    shown = ["teacher.png", "student.png", "steps.png", "classes.png", "neighbours-pixels.png", "neighbours-features.png"]
    assert names == [*shown, "curves-teacher.png", "curves-generator.png"]
    assert "could not be made" not in report_of(finished)


def test_numbers_are_those_of_the_log(finished: Path) -> None:
    report, records = report_of(finished), [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    name = "FD(digits-classifier)"
    for stage, row in (
        ("teacher", "teacher, best evaluation during training"),
        ("generator", "student, best evaluation during training"),
    ):
        best = min((r for r in reversed(records) if r["stage"] == stage and name in r), key=lambda r: r[name])
        assert f"The {stage}'s weights are those after step {best['step']} ({best['kimg']:.4g} kimg)" in report
        cells = table_row(report, row)
        assert cells[:2] == ["1 x 100", spread([best[name]])]
        assert cells[-2:] == [spread([best["precision"]]), spread([best["recall"]])]
        state = torch.load(finished / "state" / f"{stage}.pt", weights_only=True)["best"]
        assert (state["step"], state["value"]) == (best["step"], best[name])


def test_of_a_large_reference_neither_training_nor_report_measures_precision_and_recall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "MAX_REFERENCE_FOR_PR", 1000)  # digits has 1,797 images
    train(load_recipe("digits", SHORT), tmp_path / "run")
    assert '"precision"' not in (tmp_path / "run" / "log.jsonl").read_text()
    (section,) = re.findall(r"^## Scores\n(.*?)^## ", report_of(tmp_path / "run"), flags=re.MULTILINE | re.DOTALL)
    assert "| precision" not in section
    assert "Precision and recall are measured neither here nor during training: the reference has more than 1,000" in section


def test_html_is_the_report_in_one_file(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    titles = re.findall(r"^## (.*)$", report_of(finished), flags=re.MULTILINE)
    assert re.findall(r"<h2>(.*?)</h2>", page) == titles
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = [finished / link for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", report_of(finished))]
    assert [base64.b64decode(picture) for picture in pictures] == [file.read_bytes() for file in files]
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert len(page) < 5_000_000


def test_json_has_the_numbers_of_the_report(finished: Path) -> None:
    facts = json.loads((finished / "report.json").read_text())
    name = "FD(digits-classifier)"
    scores, steps = (report_of(finished).split(f"## {title}")[1].split("\n## ")[0] for title in ("Scores", "Steps"))
    assert table_row(scores, "student, one step")[1] == spread(facts["scores"]["student, one step"][name])
    for count, value in facts["teacher_by_steps"].items():
        assert table_row(steps, f"teacher, {count} steps")[-1] == f"{value:.3g}"
    assert [entry["name"] for entry in facts["classes"]] == [str(digit) for digit in range(10)]
    assert facts["weights_sha256"] == Bundle.open(finished / "generator").weights_sha256
    assert [shlex.split(line)[1:] for line in facts["commands"]] == [words[1:] for words in commands_of(report_of(finished))]


def test_steps_are_scored_as_evaluate_would(finished: Path) -> None:
    """With the teacher's own number of steps, the distance is that of the images that its engine makes."""
    from uni_instruct.train.report.inputs import open_run
    from uni_instruct.train.report.steps_section import _distance

    material = open_run(finished, finished / "report", None, None)
    assert material.evaluator is not None
    images = generate_images(material.teacher_engine, range(100), resolve_class_ids(material.teacher.spec, range(100)))
    expected = material.evaluator(images, metrics=["fd"]).values["FD(digits-classifier)"]
    assert _distance(material, material.teacher.spec.steps, 100) == pytest.approx(expected, rel=1e-6)


def test_variety_of_points_in_closed_form() -> None:
    corners = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    assert variety(corners) == pytest.approx((3 + 4 + 5) / 3)
    assert variety(corners[:1]) == 0.0


def test_pictures_are_the_images_of_the_same_noise_and_classes(finished: Path) -> None:
    seeds, classes = range(60), np.arange(60) % 10
    for name, folder in (("teacher", "teacher"), ("student", "generator")):
        images = generate_images(open_engine(finished / folder, "torch"), seeds, classes)
        assert (finished / "report" / f"{name}.png").read_bytes() == encode(contact_sheet(images, 10))


@pytest.mark.parametrize("number", range(5))
def test_commands_are_ones_that_the_command_line_takes(finished: Path, number: int) -> None:
    """Parsed, files and options checked, but not run."""
    program, name, *words = commands_of(report_of(finished))[number]
    command = command_group.get_command(
        command_group.make_context("uni-instruct", ["--help-not"], resilient_parsing=True), name
    )
    assert program == "uni-instruct"
    assert command is not None
    context = command.make_context(name, words)
    assert name == ("train", "export", "generate", "evaluate", "serve")[number]
    assert str(finished) in str(context.params)


def test_report_is_made_again_from_the_folder_and_only_when_it_is_missing(finished: Path) -> None:
    before = report_of(finished).partition("## Time")[0]
    made = (finished / "report.md").stat().st_mtime_ns
    recipe = load_recipe("digits", SHORT)
    train(recipe, finished)
    assert (finished / "report.md").stat().st_mtime_ns == made
    (finished / "report.md").unlink()
    train(load_recipe("digits", [*SHORT, "loop.report=false"]), finished)
    assert not (finished / "report.md").exists()
    write_report(finished)
    after = report_of(finished).partition("## Time")[0]
    # What depends on the machine: milliseconds, and how many step counts of the teacher its time allows.
    measured = re.compile(r"[\d.]+ ms an image|## Steps.*?(?=\n## )|!\[the teacher's distance[^\n]*", re.DOTALL)
    assert measured.sub("", after) == measured.sub("", before)
    assert report_is_current(finished)


def test_time_adds_up_over_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, log = load_recipe("digits", [*SHORT, "loop.metric=none", "loop.report=false"]), Run.log
    start = time.monotonic()

    def interrupted_log(self: Run, stage: str, step: int, kimg: float, values: dict[str, float]) -> None:
        log(self, stage, step, kimg, values)
        if (stage, step) == ("generator", 10):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted_log)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run")
    first = read_times(tmp_path / "run")
    first_s = time.monotonic() - start
    assert 0 < total(first) <= first_s

    train(recipe, tmp_path / "run")
    both = read_times(tmp_path / "run")
    assert both["teacher"] == first["teacher"]  # it was finished: nothing is added
    assert all(both["generator"][name] > first["generator"][name] for name in ("steps", "saving"))
    assert both["run"]["preparation"] > first["run"]["preparation"]
    assert total(both) <= time.monotonic() - start

    write_report(tmp_path / "run")
    report = report_of(tmp_path / "run")
    for name, seconds in both["generator"].items():
        words = {"saving": "writing states"}.get(name, name)
        assert f"| generator | {words} | {duration(seconds)} |" in report


def total(times: dict[str, dict[str, float]]) -> float:
    return sum(itertools.chain.from_iterable(parts.values() for parts in times.values()))


def test_clock_counts_every_second_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = Clock(tmp_path)
    clock.add("run", "preparation", 5)
    now = 101
    with clock.during("teacher", "steps"):
        now = 104
        with clock.during("teacher", "evaluation"):
            now = 114
            clock.write()
            now = 115
        now = 117
    expected = {"run": {"preparation": 5}, "teacher": {"steps": 3, "evaluation": 10}}
    assert read_times(tmp_path) == expected  # what was written last is what a killed run leaves
    clock.write()

    later = Clock(tmp_path)
    with later.during("teacher", "steps"):
        now = 120
        later.write()
        now = 121
        later.write()  # twice adds nothing twice
    assert read_times(tmp_path) == {"run": {"preparation": 5}, "teacher": {"steps": 9, "evaluation": 11}}
    Clock(tmp_path / "other", first_process=False).write()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("content", ["", "[1]", '{"teacher": 3}', '{"teacher": {"steps": "x"}}', "\x00"])
def test_damaged_times_are_begun_anew_and_end_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / "time.json").write_text(content)
    assert read_times(tmp_path) == {}
    assert "cannot be read and starts again from zero" in caplog.text


def test_history_reads_what_a_killed_run_left() -> None:
    lines = [
        '{"stage": "teacher", "step": 1, "kimg": 0.1, "teacher/loss": NaN}',
        '{"stage": "teacher", "step": 2, "kimg": 0.2, "teacher/loss": 2.0}',
        '{"stage": "teacher", "step": 2, "kimg": 0.2, "FD(x)": 3.0, "recall": 0.5}',
        '{"stage": "teacher", "step": 3, "warning": "diverse | *no more*"}',
        '{"stage": "teacher", "step": 4, "kimg": 0.4, "FD(x)": 3.0, "recall": 0.6}',
        '{"stage": "teacher", "step": 6, "kimg": 0.6, "FD(x)": 3.5, "recall": 0.7}',
        '{"stage": "teacher", "st',
    ]
    teacher = parse_history(lines)["teacher"]
    curve, best = teacher.curve("teacher/loss"), teacher.best("FD")
    assert (curve.kimg, curve.values) == ([0.2], [2.0])
    assert best is not None
    assert (best.step, best.value, best.scores["recall"]) == (4, 3.0, 0.6)
    assert teacher.best("KD") is teacher.best("none") is None
    assert teacher.warnings == [(3, "diverse | *no more*")]
    assert read_history(Path("nowhere")) == {}


def images_dataset(images: np.ndarray) -> Dataset:
    return Dataset(
        name="made",
        image_shape=(images.shape[3], *images.shape[1:3]),
        labels=None,
        num_classes=0,
        class_names=(),
        licence="",
        source="made",
        reader=ArrayReader(images),
    )


def test_nearest_rows_are_those_of_all_distances() -> None:
    rng = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(101, 7, generator=rng), torch.randn(20, 7, generator=rng)
    queries = torch.cat([queries, rows[[3, 50, 100]]])
    excluded = torch.tensor([-1] * 20 + [3, 50, 100])
    distances = torch.cdist(queries.double(), rows.double())
    distances[torch.arange(20, 23), excluded[20:]] = torch.inf
    expected, indices = distances.sort(dim=1)
    for size in (1, 10, 101):
        found = nearest(queries, rows.split(size), 3, excluded)
        assert torch.equal(found.indices, indices[:, :3])
        torch.testing.assert_close(found.distances.double(), expected[:, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [8, 64])
def test_copies_are_found_and_fresh_images_are_none(side: int) -> None:
    rng = np.random.default_rng(side)
    images = rng.integers(0, 256, (900, side, side, 3), dtype=np.uint8)
    dataset = images_dataset(images)
    planted = rng.permutation(900)[:200]
    copies = by_pixels(dataset, images[planted])
    assert copies.samples.indices[:, 0].tolist() == planted.tolist()
    assert copies.samples.distances[:, 0].max() < 0.1  # grey levels
    assert copies.nearer_share == 1
    assert copies.copied_share == (1, 0)

    fresh = by_pixels(dataset, rng.integers(0, 256, (400, side, side, 3), dtype=np.uint8))
    assert fresh.nearer_share == pytest.approx(0.5, abs=0.12)  # as near as the data are to themselves
    assert fresh.copied_share == (0, 0)


def test_features_find_the_copies_too() -> None:
    evaluator = Evaluator(open_dataset("digits"))
    copies = by_features(evaluator, open_dataset("digits").images(range(100)))
    assert copies is not None
    assert copies.samples.distances[:, 0].max() < 0.01
    assert copies.nearer_share == 1


def test_distance_of_pixels_is_in_grey_levels() -> None:
    images = np.zeros((3, 8, 8, 1), np.uint8)
    images[1], images[2] = 100, 200
    found = by_pixels(images_dataset(images), np.full((1, 8, 8, 1), 110, np.uint8))
    assert found.samples.indices.tolist() == [[1, 2, 0]]
    torch.testing.assert_close(found.samples.distances, torch.tensor([[10.0, 90.0, 110.0]]), rtol=1e-4, atol=1e-3)
    assert found.medians == pytest.approx((10, 100), rel=1e-4)


def test_sets_of_scores_are_of_disjoint_seeds(tiny_bundle: Bundle) -> None:
    evaluator, engine = Evaluator(open_dataset("digits")), open_engine(tiny_bundle, "torch")
    found = score_sets(evaluator, engine, "FD", 100, None)
    assert found is not None
    name = "FD(digits-classifier)"
    for number, value in enumerate(found.values[name]):
        seeds = range(100 * number, 100 * number + 100)
        classes = resolve_class_ids(tiny_bundle.spec, seeds)
        expected = evaluator(generate_images(engine, seeds, classes), classes).values
        assert value == pytest.approx(expected[name], rel=1e-5)
        assert found.values["class_accuracy"][number] == expected["class_accuracy"]
    assert score_sets(evaluator, engine, "FD", 100, scores.BUDGET_S / 99) is None  # a set would take too long


@pytest.mark.parametrize(
    ("shape", "classes", "makes"),
    [((3, 8, 8), 0, True), ((1, 8, 8), 1, True), ((1, 8, 8), 20, True), ((4, 8, 8), 2, False)],
    ids=["colour, unconditional", "one class", "many classes", "latents"],
)
def test_a_teacher_alone_is_reported_too(tmp_path: Path, shape: tuple[int, int, int], classes: int, makes: bool) -> None:
    folder = tmp_path / "given teacher"
    teacher = random_bundle(folder, seed=1, steps=3, num_classes=0, image_shape=shape, latents=not makes)
    if classes:
        spec = dataclasses.replace(teacher.spec, num_classes=classes, class_names=tuple(f"class|{n}" for n in range(classes)))
        weights = {name: tensor.numpy() for name, tensor in build_denoiser(spec).state_dict().items()}
        teacher = Bundle.write(tmp_path / "given teacher", spec, weights, "test")
    given = [
        *WITHOUT_DATA,
        f"teacher.bundle={teacher.path}",
        "distillation.batch=8",
        "distillation.duration_kimg=0.04",
        "critic_warmup_kimg=0",
    ]
    train(load_recipe("digits", [*given, "loop.grid=4", "loop.samples=8", "loop.log_kimg=0.008"]), tmp_path / "run")
    report, names = report_of(tmp_path / "run"), [Path(link).name for link in assert_links_hold(tmp_path / "run")]
    assert names == (["teacher.png", "student.png"] if makes else []) + ["curves-generator.png"]
    assert "There are no scores" in report
    assert "could not be made" not in report
    assert ("No pictures: " in report) is not makes
    expected = ["train", "export", "generate", "serve"] if makes else ["train", "generate", "import"]
    assert [words[1] for words in commands_of(report)] == expected
    assert f"given, {text(str(teacher.path))}" in report


def test_a_section_that_fails_leaves_the_others_and_says_so(
    finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    def broken(material: Any) -> list[str]:
        raise ZeroDivisionError("by | nothing")

    monkeypatch.setattr(page, "SECTIONS", page.SECTIONS | {"Scores": broken})
    write_report(finished)
    report = report_of(finished)
    assert "## Scores\n\nThis section could not be made: by \\| nothing\n" in report
    reason = "package 'matplotlib' is not installed; pip install 'uni-instruct\\[train\\]'"
    assert f"## Curves\n\nThis section could not be made: {reason}\n" in report
    assert "section 'Scores' of the report could not be made: ZeroDivisionError" in caplog.text
    assert {"## Samples", "## Commands", "## Time"} <= set(report.splitlines())
    assert_links_hold(finished)


def test_a_report_that_cannot_be_written_costs_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    teacher = random_bundle(tmp_path / "teacher", seed=1, steps=3)
    (tmp_path / "run" / "report.md" / "in the way").mkdir(parents=True)
    given = [
        *WITHOUT_DATA,
        f"teacher.bundle={teacher.path}",
        "distillation.batch=8",
        "distillation.duration_kimg=0.016",
        "critic_warmup_kimg=0",
    ]
    with caplog.at_level(logging.WARNING):
        bundle = train(load_recipe("digits", [*given, "loop.samples=8", "loop.grid=4"]), tmp_path / "run")
    assert Bundle.open(bundle.path).weights_sha256 == bundle.weights_sha256
    assert "report.md could not be written: " in caplog.text
    assert "the training is complete" in caplog.text


def test_words_are_not_taken_for_markdown() -> None:
    assert text("KL(a || b)\n*r*_x_ [1] <b> `c` # ~") == r"KL(a \|\| b) \*r\*\_x\_ \[1\] \<b\> \`c\` \# \~"
    assert spread([1.0]) == "1"
    assert spread([1.0, 2.0, 3.0]) == "2 ± 1"
    assert [duration(s) for s in (3.21, 119, 3600, 7260)] == ["3.21 s", "119 s", "60 min", "2 h 01 min"]
