"""Data sets that a seed draws: each is read with every file accounted for, or refused in one line; all commands agree."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from builders.odd_data import OddData, odd_data
from builders.odd_pictures import level_of
from uni_instruct.data import Dataset, open_dataset
from uni_instruct.train.dry_run import report
from uni_instruct.train.plan import Plan

Cli = Callable[..., tuple[int, str, str]]
SEEDS = [*range(60), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(60, 300))]
NETWORK = ("network.model_channels=16", "network.channel_mult=[1]", "network.attn_resolutions=[]", "loop.metric=none")
LOSS = 3  # of a level, in lossy forms


def nearest(level: int, levels: list[int]) -> int:
    found = min(levels, key=lambda one: abs(one - level))
    assert abs(found - level) <= LOSS, f"{level} is none of {levels}"
    return found


def classes_of(dataset: Dataset, levels: list[int]) -> list[tuple[int, str | None]]:
    """Level and class of every picture that was read, sorted."""
    pictures = dataset.stored(range(len(dataset)))
    names = [None] * len(dataset) if dataset.labels is None else [dataset.class_names[k] for k in dataset.labels]
    return sorted((nearest(level_of(picture), levels), name) for picture, name in zip(pictures, names, strict=True))


def check_is_read(data: OddData) -> Dataset:
    """Every picture once, with its class; what is left out counted."""
    dataset = open_dataset(data.path)
    assert classes_of(dataset, list(data.classes)) == sorted(data.classes.items())
    assert dataset.image_shape == (data.channels, data.size[1], data.size[0])
    counted = {what: re.search(rf"(\d+) {what}s? .*?skipped", dataset.note) for what in ("file", "name")}
    assert {what: int(found[1]) if found else 0 for what, found in counted.items()} == {
        "file": data.passed_over,
        "name": data.repeated,
    }
    for note in data.notes:
        assert re.search(note, dataset.note), (note, dataset.note)
    assert dataset.note.isprintable()
    return dataset


class Accepted(Exception):
    """Recipe and data have passed `train --dry-run`, which goes on to count and time what a training costs."""


@pytest.fixture
def only_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run ends where it has opened all: the seconds after that are the same for all data."""

    def accept(_: Plan) -> Plan:
        raise Accepted

    monkeypatch.setattr(report, "resolve_auto", accept)


def dry_run(cli: Cli, data: OddData) -> tuple[int, str, str]:
    """As a user would: where the data have no classes, once more with what the refusal says."""
    command = ["train", "digits", *NETWORK, f"data={data.path}", "--dry-run"]
    if set(data.classes.values()) == {None}:
        if not data.faults:
            code, _, errors = cli(*command)
            assert (code, len(errors.splitlines())) == (2, 1)
            assert re.search("has no classes.*; --set network.conditional=false$", errors.strip())
        command += ["--set", "network.conditional=false"]
    try:
        return cli(*command)
    except Accepted:
        return 0, "", ""


def check_follows_the_remedy(data: OddData, tmp_path: Path, cli: Cli) -> None:
    """Pictures of another size are brought to one by the option that the refusal names."""
    out = tmp_path / "resized.zip"
    assert cli("data", "prepare", data.path, "--resolution", "8", "--out", out)[0] == 0, data.words
    assert classes_of(open_dataset(out), list(data.classes)) == sorted(data.classes.items())


@pytest.mark.parametrize("seed", SEEDS)
def test_every_file_is_accounted_for_or_the_set_is_refused(seed: int, tmp_path: Path, cli: Cli, only_opened: None) -> None:
    data = odd_data(seed, tmp_path)
    answers = {
        "check": cli("data", "check", data.path),
        "prepare": cli("data", "prepare", data.path, "--out", tmp_path / "prepared.zip"),
        "dry run": dry_run(cli, data),
    }
    wanted = 2 if data.faults else 0
    # Codes alone tell a refusal from a traceback, which this process would end in.
    assert {command: code for command, (code, _, _) in answers.items()} == dict.fromkeys(answers, wanted), (data.words, answers)
    if not data.faults:
        dataset = check_is_read(data)
        prepared = open_dataset(tmp_path / "prepared.zip")
        assert prepared.fingerprint() == dataset.fingerprint()
        assert prepared.class_names == dataset.class_names
        return
    assert not (tmp_path / "prepared.zip").exists()
    for command in ("prepare", "dry run"):
        errors = [line for line in answers[command][2].splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, answers[command]
        assert any(re.search(fault, errors[0]) for fault in data.faults), (data.words, data.faults, errors)
    for fault in data.faults:
        assert re.search(fault, answers["check"][1]), (data.words, fault, answers["check"])
    if data.mixed_sizes and len(data.faults) == 1:
        check_follows_the_remedy(data, tmp_path, cli)
